"""First-party stages of the family tracker."""
