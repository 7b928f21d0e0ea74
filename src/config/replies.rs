//! The option `routing-replies`: `target`, `own`, or a file of routing traces.

use std::convert::Infallible;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The replies on whose tokens the routing method counts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum RoutingReplies {
    /// The target replies of the rows.
    #[default]
    Target,
    /// The model's own greedy replies.
    Own,
    /// The replies of routing traces in this file.
    File(PathBuf),
}

impl RoutingReplies {
    /// The file of routing traces.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::File(path) => Some(path),
            Self::Target | Self::Own => None,
        }
    }
}

impl FromStr for RoutingReplies {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text {
            "target" => Self::Target,
            "own" => Self::Own,
            path => Self::File(path.into()),
        })
    }
}

impl fmt::Display for RoutingReplies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Target => f.write_str("target"),
            Self::Own => f.write_str("own"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

impl Serialize for RoutingReplies {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            // A path that is not UTF-8 is an error, as for the other paths.
            Self::File(path) => path.serialize(to),
            other => to.collect_str(other),
        }
    }
}

impl<'de> Deserialize<'de> for RoutingReplies {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let Ok(replies) = String::deserialize(from)?.parse();
        Ok(replies)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_paths() {
        for (text, replies) in [
            ("target", RoutingReplies::Target),
            ("own", RoutingReplies::Own),
            ("./own", RoutingReplies::File("./own".into())),
            ("traces.jsonl", RoutingReplies::File("traces.jsonl".into())),
        ] {
            assert_eq!(text.parse(), Ok(replies.clone()));
            assert_eq!(replies.to_string(), text);
            let json = serde_json::to_value(&replies).unwrap();
            assert_eq!((json.as_str(), serde_json::from_value(json.clone()).ok()), (Some(text), Some(replies)));
        }
    }
}
