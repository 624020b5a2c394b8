"""The reverse-generator paper's experiment: detection, mitigation, its tables and its figures."""
