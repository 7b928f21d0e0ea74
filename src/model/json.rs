//! Strict reading of JSON objects: in order, and a repeated key is an error.
//!
//! `serde_json` silently keeps the last of two equal keys, so that one file could have different meanings for different
//! readers.

use std::collections::HashSet;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

/// Calls `read` for each member with its key; `read` takes the value. A repeated key is an error. Errors begin with the key.
pub(crate) fn each_member<'de, A: MapAccess<'de>>(
    mut map: A,
    mut read: impl FnMut(String, &mut A) -> Result<(), A::Error>,
) -> Result<(), A::Error> {
    let mut seen = HashSet::new();
    while let Some(key) = map.next_key::<String>()? {
        if !seen.insert(key.clone()) {
            return Err(A::Error::custom(format_args!("the name `{key}` occurs twice")));
        }
        read(key.clone(), &mut map).map_err(|e| A::Error::custom(format_args!("`{key}`: {e}")))?;
    }
    Ok(())
}

/// The members of an object in the order of the file, with unique keys.
pub(crate) struct Members<T>(pub(crate) Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Members<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Walk<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Walk<T> {
            type Value = Members<T>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Members<T>, A::Error> {
                let mut members = Vec::new();
                each_member(map, |key, map| {
                    members.push((key, map.next_value()?));
                    Ok(())
                })?;
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Walk(PhantomData))
    }
}
