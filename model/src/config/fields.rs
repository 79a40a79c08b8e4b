//! Typed, bounded access to the fields of one JSON object.
//!
//! Every read names the file and the dotted field when it refuses: a missing field, a wrong type, a
//! value outside its bounds. JSON `null` counts as missing, except where the caller asks for it.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::error::LoadError;

/// One object of a JSON file, and how to name its fields in errors.
pub(crate) struct Fields<'a> {
    map: &'a Map<String, Value>,
    file: &'a str,
    /// Dotted prefix, such as `rope_scaling.`; empty at the top.
    prefix: String,
}

impl<'a> Fields<'a> {
    pub fn new(map: &'a Map<String, Value>, file: &'a str) -> Self {
        Fields { map, file, prefix: String::new() }
    }

    /// The error for `field` of this object.
    pub fn refuse(&self, field: &str, problem: impl Into<String>) -> LoadError {
        LoadError::field(self.file, &format!("{}{field}", self.prefix), problem)
    }

    /// The value of `field`, if it is there and not `null`.
    pub fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|v| !v.is_null())
    }

    /// Whether `field` is there, `null` or not.
    pub fn has(&self, field: &str) -> bool {
        self.map.contains_key(field)
    }

    fn wrong(&self, field: &str, expected: &str, got: &Value) -> LoadError {
        let mut text = got.to_string();
        if let Some((cut, _)) = text.char_indices().nth(60) {
            text.truncate(cut);
            text.push('…');
        }
        self.refuse(field, format!("expected {expected}, got {text}"))
    }

    /// The object in `field`; `None` if it is missing, `null` or empty.
    pub fn object(&self, field: &str) -> Result<Option<Fields<'a>>, LoadError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(map)) if map.is_empty() => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields {
                map,
                file: self.file,
                prefix: format!("{}{field}.", self.prefix),
            })),
            Some(other) => Err(self.wrong(field, "an object", other)),
        }
    }

    /// An integer within `bounds`; `None` if it is missing.
    pub fn int(
        &self,
        field: &str,
        bounds: RangeInclusive<usize>,
    ) -> Result<Option<usize>, LoadError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        // A whole number written as a float, as some tools do, is the same number.
        let whole = value
            .as_f64()
            .filter(|v| value.is_f64() && v.fract() == 0.0 && (0.0..9.0e15).contains(v))
            .map(|v| v as u64);
        let number = value.as_u64().or(whole).and_then(|v| usize::try_from(v).ok());
        match number {
            Some(n) if bounds.contains(&n) => Ok(Some(n)),
            Some(n) => Err(self.refuse(
                field,
                format!("{n} is out of bounds, expected {} to {}", bounds.start(), bounds.end()),
            )),
            None => {
                let expected = format!("an integer from {} to {}", bounds.start(), bounds.end());
                Err(self.wrong(field, &expected, value))
            }
        }
    }

    /// An integer within `bounds` that has to be there.
    pub fn need(&self, field: &str, bounds: RangeInclusive<usize>) -> Result<usize, LoadError> {
        self.int(field, bounds)?.ok_or_else(|| self.refuse(field, "missing"))
    }

    /// A finite number within `bounds`; `None` if it is missing.
    pub fn float(
        &self,
        field: &str,
        bounds: RangeInclusive<f64>,
    ) -> Result<Option<f64>, LoadError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x.is_finite() && bounds.contains(&x) => Ok(Some(x)),
            Some(x) => Err(self.refuse(
                field,
                format!("{x} is out of bounds, expected {} to {}", bounds.start(), bounds.end()),
            )),
            None => Err(self.wrong(field, "a number", value)),
        }
    }

    /// A boolean; `default` if it is missing.
    pub fn flag(&self, field: &str, default: bool) -> Result<bool, LoadError> {
        match self.get(field) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => Err(self.wrong(field, "true or false", other)),
        }
    }

    /// As `flag`, but an explicit `null` is false, as it is in Python.
    pub fn flag_or_null(&self, field: &str, default: bool) -> Result<bool, LoadError> {
        self.flag(field, default && !self.has(field))
    }

    /// A string; `None` if it is missing.
    pub fn text(&self, field: &str) -> Result<Option<&'a str>, LoadError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(self.wrong(field, "a string", other)),
        }
    }

    /// An array; `None` if it is missing.
    pub fn array(&self, field: &str) -> Result<Option<&'a [Value]>, LoadError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(other) => Err(self.wrong(field, "an array", other)),
        }
    }
}
