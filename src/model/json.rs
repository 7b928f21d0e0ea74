//! JSON objects read strictly: in order, and with a repeated key as an error.
//!
//! `serde_json` keeps the last of two equal keys without a word, which lets a file mean different things to different
//! readers.

use std::collections::HashSet;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

/// Calls `read` for each member, to take its value; every key occurs once. Errors begin with the key.
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

/// An object's members in the order of the file; every key occurs once.
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
