//! A JSON object whose fields are parsed one by one, so that an error names the
//! field it is in. Known fields are kept as slices of the body, unknown ones
//! skipped; nothing is allocated for a value before its type is known.

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;

use http::StatusCode;
use serde::Deserialize;
use serde::de::{self, DeserializeSeed, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::error::ApiError;

/// As deep as serde_json itself goes.
const MAX_DEPTH: usize = 128;

/// The known fields of one request.
pub struct Fields<'a>(BTreeMap<&'static str, &'a RawValue>);

impl<'a> Fields<'a> {
    /// Splits `body` into the fields that the lists of `known` name.
    ///
    /// # Errors
    /// 400 when the body is no JSON object, naming the field it breaks in.
    pub fn parse(body: &'a [u8], known: &[&'static [&'static str]]) -> Result<Self, ApiError> {
        let bad = |message: String| ApiError::request(StatusCode::BAD_REQUEST, message);
        let text = std::str::from_utf8(body)
            .map_err(|error| bad(format!("body is not UTF-8 at byte {}", error.valid_up_to())))?;
        if deeper_than(body, MAX_DEPTH) {
            return Err(bad(format!("body nests deeper than {MAX_DEPTH} levels")));
        }
        let at = Cell::new(None);
        let mut json = serde_json::Deserializer::from_str(text);
        let fields = Split { known, at: &at }
            .deserialize(&mut json)
            .and_then(|fields| json.end().map(|()| fields));
        fields.map_err(|error| {
            let message = format!("body is not a valid JSON object: {error}");
            match at.get() {
                Some(field) => ApiError::field(field, message),
                None => bad(message),
            }
        })
    }

    /// The field's raw text, unless absent or null.
    pub fn raw(&self, name: &str) -> Option<&'a str> {
        self.0.get(name).map(|raw| raw.get()).filter(|raw| *raw != "null")
    }

    /// The field as `T`; none when absent or null.
    pub fn get<T: Deserialize<'a>>(&self, name: &'static str) -> Result<Option<T>, ApiError> {
        self.raw(name).map(|raw| parse(raw, name)).transpose()
    }

    /// The field as an integer from `least` to `most`.
    pub fn integer(
        &self,
        name: &'static str,
        least: i64,
        most: i64,
    ) -> Result<Option<i64>, ApiError> {
        let value: Option<i64> = self.get(name)?;
        match value {
            Some(value) if !(least..=most).contains(&value) => Err(ApiError::field(
                name,
                format!("`{name}` must be from {least} to {most}, not {value}"),
            )),
            value => Ok(value),
        }
    }

    /// The field as a number from `least` to `most`.
    pub fn number(
        &self,
        name: &'static str,
        least: f64,
        most: f64,
    ) -> Result<Option<f32>, ApiError> {
        let value: Option<f64> = self.get(name)?;
        match value {
            Some(value) if !(least..=most).contains(&value) => Err(ApiError::field(
                name,
                format!("`{name}` must be from {least} to {most}, not {value}"),
            )),
            value => Ok(value.map(|value| value as f32)),
        }
    }

    pub fn flag(&self, name: &'static str) -> Result<bool, ApiError> {
        Ok(self.get(name)?.unwrap_or(false))
    }
}

/// One value, with `param` named in the error.
pub fn parse<'a, T: Deserialize<'a>>(raw: &'a str, param: &str) -> Result<T, ApiError> {
    serde_json::from_str(raw).map_err(|error| {
        let text = error.to_string();
        // The position is within the field, which would only mislead.
        let problem = text.rsplit_once(" at line ").map_or(text.as_str(), |(problem, _)| problem);
        ApiError::field(param, format!("`{param}` is not valid: {problem}"))
    })
}

/// Whether brackets outside strings nest deeper than `limit`.
fn deeper_than(body: &[u8], limit: usize) -> bool {
    let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
    for &byte in body {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > limit {
            return true;
        }
    }
    false
}

/// Reads an object; `at` is the known field being read.
struct Split<'c> {
    known: &'c [&'static [&'static str]],
    at: &'c Cell<Option<&'static str>>,
}

impl<'a> DeserializeSeed<'a> for Split<'_> {
    type Value = Fields<'a>;

    fn deserialize<D: de::Deserializer<'a>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'a> Visitor<'a> for Split<'_> {
    type Value = Fields<'a>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<M: MapAccess<'a>>(self, mut map: M) -> Result<Self::Value, M::Error> {
        let mut fields = BTreeMap::new();
        while let Some(Key(key)) = map.next_key()? {
            match self.known.iter().copied().flatten().find(|known| **known == key) {
                Some(known) => {
                    self.at.set(Some(known));
                    fields.insert(*known, map.next_value()?);
                    self.at.set(None);
                }
                None => {
                    map.next_value::<de::IgnoredAny>()?;
                }
            }
        }
        Ok(Fields(fields))
    }
}

/// A key, borrowed unless it has escapes.
#[derive(Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &[&str] = &["n", "text", "flag"];

    fn error(body: &str) -> String {
        Fields::parse(body.as_bytes(), &[KNOWN]).err().unwrap().json()
    }

    #[test]
    fn known_fields_are_found_whatever_else_is_there() {
        let body = r#"{"x": [1, {"n": 2}], "n": 3, "flag": null, "te\u0078t": "a"}"#;
        let fields = Fields::parse(body.as_bytes(), &[KNOWN]).unwrap();
        assert_eq!(fields.integer("n", 0, 9).unwrap(), Some(3));
        assert_eq!(fields.get::<bool>("flag").unwrap(), None);
        assert_eq!(fields.get::<String>("text").unwrap().as_deref(), Some("a"));
    }

    #[test]
    fn the_field_that_breaks_the_json_is_named() {
        assert!(error(r#"{"n": NaN}"#).contains(r#""param":"n""#));
        assert!(error(r#"{"x": NaN}"#).contains(r#""param":null"#));
        assert!(error("[]").contains("expected an object"));
        assert!(error("").contains("EOF"));
        assert!(error(r#"{"n": 1} x"#).contains("trailing"));
    }

    #[test]
    fn depth_is_limited_even_in_unknown_fields() {
        let deep = format!("{{\"x\": {}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(error(&deep).contains("deeper than 128"));
        let brackets_in_text = format!("{{\"x\": \"\\\"{}\"}}", "[".repeat(1000));
        assert!(Fields::parse(brackets_in_text.as_bytes(), &[KNOWN]).is_ok());
    }

    #[test]
    fn values_out_of_range_or_type_are_named() {
        for (body, problem) in [
            (r#"{"n": -1}"#, "from 0 to 9, not -1"),
            (r#"{"n": 1e9}"#, "expected i64"),
            (r#"{"n": 99999999999999999999}"#, "`n` is not valid"),
            (r#"{"n": "3"}"#, "expected i64"),
        ] {
            let fields = Fields::parse(body.as_bytes(), &[KNOWN]).unwrap();
            let error = fields.integer("n", 0, 9).unwrap_err().json();
            assert!(error.contains(problem) && error.contains(r#""param":"n""#), "{error}");
        }
        let fields = Fields::parse(br#"{"text": "\ud800"}"#, &[KNOWN]).unwrap();
        let error = fields.get::<String>("text").unwrap_err().json();
        assert!(error.contains("hex escape") && error.contains(r#""param":"text""#), "{error}");
    }
}
