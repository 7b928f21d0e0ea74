//! The option `layers`: a range of decoder layers, written as `all`, `8` or `8-15`.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Decoder layers to select experts from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layers {
    /// Every MoE layer.
    All,
    /// First to last, both included. A reversed range parses; the validation refuses it.
    Range(RangeInclusive<usize>),
}

impl Layers {
    /// The resolved option: `None` means all layers.
    pub(super) fn range(self) -> Option<RangeInclusive<usize>> {
        match self {
            Layers::All => None,
            Layers::Range(range) => Some(range),
        }
    }
}

impl FromStr for Layers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "all" {
            return Ok(Layers::All);
        }
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        match (first.trim().parse(), last.trim().parse()) {
            (Ok(first), Ok(last)) => Ok(Layers::Range(first..=last)),
            _ => Err(format!("`{text}` is not `all`, one layer (`8`) or one range of layers (`8-15`)")),
        }
    }
}

impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Layers::All => f.write_str("all"),
            Layers::Range(r) if r.start() == r.end() => write!(f, "{}", r.start()),
            Layers::Range(r) => write!(f, "{}-{}", r.start(), r.end()),
        }
    }
}

impl Serialize for Layers {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Layers {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Layers;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("`all`, one layer (`8`) or one range of layers (`8-15`)")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Layers, E> {
                text.parse().map_err(E::custom)
            }
            // In YAML a single layer is a number.
            fn visit_u64<E: de::Error>(self, layer: u64) -> Result<Layers, E> {
                layer.to_string().parse().map_err(E::custom)
            }
        }
        from.deserialize_any(Text)
    }
}

/// `#[serde(with = "layers")]` for a resolved option: `None` means all layers.
pub(super) fn serialize<S: Serializer>(layers: &Option<RangeInclusive<usize>>, to: S) -> Result<S::Ok, S::Error> {
    layers.clone().map_or(Layers::All, Layers::Range).serialize(to)
}

/// The inverse of [`serialize`].
pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<RangeInclusive<usize>>, D::Error> {
    Layers::deserialize(from).map(Layers::range)
}
