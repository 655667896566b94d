//! Operators of ktx: the module traits, the operator roles, the registry, and the built-in operators.
