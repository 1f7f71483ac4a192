//! Prepared statements: what goes to the backend, by cases.
use super::*;
