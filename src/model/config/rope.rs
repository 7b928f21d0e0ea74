//! Rotary embeddings: the inverse frequencies of every scaling type, computed once.
//!
//! The formulas are those of transformers 5.17, `modeling_rope_utils.py`, in the same precision (f32), so that angles agree
//! to the last bits. Both spellings are read: `rope_theta` with `rope_scaling` (`type` or `rope_type`), and
//! `rope_parameters`, which holds the theta.
//!
//! The types `dynamic` and `longrope` choose their frequencies by the length of the sequence. Here the frequencies for
//! lengths within the original context are used, and longer sequences are refused (`ModelConfig::check_length`): a packed
//! batch holds sequences of many lengths, and scores must not depend on how sequences are batched.

use std::f32::consts::TAU;

use super::error::Error;
use super::raw::RawConfig;
use crate::backend::Rope;

/// The frequencies, and the longest sequence in tokens for which they are valid (`None`: any).
pub(super) fn read(
    raw: &RawConfig,
    default_theta: f64,
    dim: usize,
    positions: usize,
) -> Result<(Rope, Option<usize>), Error> {
    // `rope_scaling`, the older key, takes precedence, as in transformers.
    let scaling = match raw.object("rope_scaling")? {
        Some(scaling) if !scaling.is_empty() => Some(scaling),
        _ => raw.object("rope_parameters")?,
    };
    let top_theta = raw.number_above("rope_theta", 1.0)?.unwrap_or(default_theta);
    let Some(scaling) = scaling else {
        return Ok((plain(top_theta, dim), None));
    };
    let theta = scaling.number_above("rope_theta", 1.0)?.unwrap_or(top_theta);
    if scaling.number("partial_rotary_factor")?.is_some_and(|part| part != 1.0) {
        return Err(
            scaling.unsupported("partial_rotary_factor", "these families rotate whole heads: only 1.0 is supported")
        );
    }
    if let Some(nested) = ["full_attention", "sliding_attention"].iter().find(|key| scaling.get(key).is_some()) {
        return Err(scaling.unsupported(nested, "rotary embeddings that differ between layers are not supported"));
    }
    // A value outside the scaling object takes precedence.
    let original = match raw.size("original_max_position_embeddings")? {
        Some(n) => n,
        None => scaling.size("original_max_position_embeddings")?.unwrap_or(positions),
    };
    let kind = match scaling.string("rope_type")? {
        Some(kind) => kind,
        None => scaling.string("type")?.unwrap_or("default"),
    };
    match kind {
        "default" => Ok((plain(theta, dim), None)),
        "linear" => {
            let factor = required(&scaling, "factor")? as f32;
            let mut rope = plain(theta, dim);
            rope.inv_freq.iter_mut().for_each(|f| *f /= factor);
            Ok((rope, None))
        }
        "dynamic" => {
            // Up to `positions` the base is theta · (factor − (factor − 1))^… = theta.
            required(&scaling, "factor")?;
            Ok((plain(theta, dim), Some(positions)))
        }
        "llama3" => Ok((llama3(&scaling, theta, dim, original)?, None)),
        "yarn" => Ok((yarn(&scaling, theta, dim, original, positions)?, None)),
        "longrope" => Ok((longrope(&scaling, theta, dim, original, positions)?, Some(original))),
        other => {
            let message =
                format!("`{other}` is not supported; known: default, linear, dynamic, llama3, yarn, longrope");
            Err(scaling.unsupported("rope_type", message))
        }
    }
}

fn required(scaling: &RawConfig, key: &str) -> Result<f64, Error> {
    scaling.number_above(key, 0.0)?.ok_or_else(|| scaling.invalid(key, "is missing, but this rope_type needs it"))
}

/// theta^(2i/dim)
fn pos_freqs(theta: f64, dim: usize) -> impl Iterator<Item = f32> {
    (0..dim / 2).map(move |i| (theta as f32).powf((2 * i) as f32 / dim as f32))
}

fn plain(theta: f64, dim: usize) -> Rope {
    Rope { inv_freq: pos_freqs(theta, dim).map(f32::recip).collect(), scale: 1.0 }
}

/// Llama 3.1: frequencies of long wavelengths are divided by `factor`, those of short wavelengths stay, and between the two
/// they are interpolated.
fn llama3(scaling: &RawConfig, theta: f64, dim: usize, original: usize) -> Result<Rope, Error> {
    let factor = required(scaling, "factor")? as f32;
    let (low, high) = (required(scaling, "low_freq_factor")? as f32, required(scaling, "high_freq_factor")? as f32);
    if low >= high {
        return Err(scaling.invalid("high_freq_factor", format!("{high} must be above low_freq_factor {low}")));
    }
    let context = original as f32;
    let mut rope = plain(theta, dim);
    for f in &mut rope.inv_freq {
        let wave = TAU / *f;
        if wave > context / low {
            *f /= factor;
        } else if wave >= context / high {
            let smooth = (context / wave - low) / (high - low);
            *f = (1.0 - smooth) * *f / factor + smooth * *f;
        }
    }
    Ok(rope)
}

/// YaRN (arXiv 2309.00071): a linear ramp over the pairs of dimensions from unchanged to interpolated frequencies. It begins
/// and ends at the pairs that make `beta_fast` and `beta_slow` rotations within the original context.
fn yarn(scaling: &RawConfig, theta: f64, dim: usize, original: usize, positions: usize) -> Result<Rope, Error> {
    let ratio = positions as f64 / original as f64;
    let factor = scaling.number_above("factor", 0.0)?.unwrap_or(ratio);
    let mscale = |scale: f64, m: f64| if scale <= 1.0 { 1.0 } else { 0.1 * m * scale.ln() + 1.0 };
    let zero_is_absent = |key| Ok::<_, Error>(scaling.number(key)?.filter(|x| *x != 0.0));
    let attention = match scaling.number_above("attention_factor", 0.0)? {
        Some(given) => given,
        None => match (zero_is_absent("mscale")?, zero_is_absent("mscale_all_dim")?) {
            (Some(m), Some(all)) => mscale(factor, m) / mscale(factor, all),
            _ => mscale(factor, 1.0),
        },
    };
    let fast = scaling.number_above("beta_fast", 0.0)?.unwrap_or(32.0);
    let slow = scaling.number_above("beta_slow", 0.0)?.unwrap_or(1.0);
    // The pair that makes this many rotations within the original context.
    let pair =
        |rotations: f64| dim as f64 * (original as f64 / (rotations * std::f64::consts::TAU)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) = (pair(fast), pair(slow));
    if scaling.flag("truncate", true)? {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dim as f64 - 1.0));
    if low == high {
        high += 0.001; // avoids a division by zero, as in the reference
    }
    let blend = |(i, freq): (usize, f32)| {
        let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
        (factor as f32 * freq).recip() * ramp + freq.recip() * (1.0 - ramp)
    };
    Ok(Rope { inv_freq: pos_freqs(theta, dim).enumerate().map(blend).collect(), scale: attention as f32 })
}

/// LongRoPE (arXiv 2402.13753) with the factors for the original context.
fn longrope(scaling: &RawConfig, theta: f64, dim: usize, original: usize, positions: usize) -> Result<Rope, Error> {
    let factor = scaling.number_above("factor", 0.0)?.unwrap_or(positions as f64 / original as f64);
    let attention = match scaling.number_above("attention_factor", 0.0)? {
        Some(given) => given,
        None if factor <= 1.0 => 1.0,
        None if original == 1 => return Err(scaling.invalid("original_max_position_embeddings", "must be above 1")),
        None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
    };
    let short: Option<Vec<f32>> = scaling.list("short_factor")?.and_then(|list| {
        list.iter().map(|value| value.as_f64().filter(|x| x.is_finite() && *x > 0.0).map(|x| x as f32)).collect()
    });
    let Some(short) = short.filter(|short| short.len() == dim / 2) else {
        return Err(scaling.invalid("short_factor", format!("must be a list of {} numbers above 0", dim / 2)));
    };
    let inv_freq = pos_freqs(theta, dim).zip(short).map(|(freq, factor)| (factor * freq).recip()).collect();
    Ok(Rope { inv_freq, scale: attention as f32 })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Frequencies and limit from a config.json with these keys, for a head width of 16, 4096 positions and a default theta of
    /// 1e6.
    fn rope(keys: Value) -> Result<(Rope, Option<usize>), Error> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, keys.to_string()).unwrap();
        read(&RawConfig::read(&path)?, 1e6, 16, 4096)
    }

    /// Frequencies and scale from transformers 5.17 (`MixtralRotaryEmbedding`) for the same keys.
    #[test]
    #[rustfmt::skip]
    fn frequencies_are_those_of_transformers() {
        let cases: Vec<(Value, [f32; 8], f32)> = vec![
            (json!({"rope_theta": 10000.0}), [1.0, 0.31622776, 0.1, 0.03162278, 0.01, 0.0031622779, 0.001, 0.0003162278], 1.0),
            (json!({"rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}}), [1.0, 0.17782794, 0.03162278, 0.0056234132, 0.001, 0.00017782794, 3.1622774e-05, 5.6234135e-06], 1.0),
            (json!({}), [1.0, 0.17782794, 0.03162278, 0.0056234132, 0.001, 0.00017782794, 3.1622774e-05, 5.6234135e-06], 1.0),
            (json!({"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}), [0.25, 0.07905694, 0.025, 0.007905695, 0.0025, 0.00079056947, 0.00025, 7.905695e-05], 1.0),
            (json!({"rope_theta": 10000.0, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}), [1.0, 0.31622776, 0.1, 0.03162278, 0.01, 0.0031622779, 0.001, 0.0003162278], 1.0),
            (json!({"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}}), [1.0, 0.19392276, 0.027344134, 0.00091158313, 0.00017677668, 3.4281024e-05, 6.6478697e-06, 1.2891732e-06], 1.0),
            (json!({"rope_theta": 1000000.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}}), [1.0, 0.13337095, 0.01581139, 0.0014058533, 0.00025, 4.4456985e-05, 7.905694e-06, 1.4058534e-06], 1.1386294),
            (json!({"rope_theta": 10000.0, "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 256, "beta_fast": 16, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": false}}), [1.0, 0.284115, 0.035863712, 0.00079056947, 0.00025, 7.905695e-05, 2.5e-05, 7.9056945e-06], 0.919156),
            (json!({"rope_theta": 10000.0, "original_max_position_embeddings": 512, "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0], "long_factor": [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]}}), [1.0, 0.28747976, 0.083333336, 0.02108185, 0.005, 0.0012649111, 0.00033333333, 7.905695e-05], 1.1547005),
        ];
        for (keys, freqs, scale) in cases {
            let (rope, _) = rope(keys.clone()).unwrap();
            for (i, (ours, theirs)) in rope.inv_freq.iter().zip(freqs).enumerate() {
                // Two implementations of pow in f32, each accurate to one ulp; interpolations and quotients add one or two.
                assert!((ours - theirs).abs() <= 4.0 * f32::EPSILON * theirs, "{keys}: pair {i}: {ours} != {theirs}");
            }
            assert!((rope.scale - scale).abs() <= f32::EPSILON * scale, "{keys}: {} != {scale}", rope.scale);
        }
    }

    #[test]
    fn types_that_depend_on_the_length_have_a_limit() {
        let longrope = json!({"type": "longrope", "factor": 4.0, "short_factor": [1, 1, 1, 1, 1, 1, 1, 1],
            "long_factor": [2, 2, 2, 2, 2, 2, 2, 2], "original_max_position_embeddings": 512});
        for (scaling, limit) in [(json!({"type": "dynamic", "factor": 2.0}), 4096), (longrope, 512)] {
            assert_eq!(rope(json!({"rope_scaling": scaling})).unwrap().1, Some(limit));
        }
        assert_eq!(rope(json!({})).unwrap().1, None);
    }

    #[test]
    fn invalid_values_name_their_key() {
        let cases = [
            ("rope_theta", json!({"rope_theta": -1.0})),
            ("rope_theta", json!({"rope_theta": "big"})),
            ("rope_scaling.factor", json!({"rope_scaling": {"type": "linear"}})),
            ("rope_scaling.factor", json!({"rope_scaling": {"type": "yarn", "factor": 0}})),
            ("rope_scaling.rope_type", json!({"rope_scaling": {"type": "mrope"}})),
            (
                "rope_scaling.high_freq_factor",
                json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0,
                "low_freq_factor": 4.0, "high_freq_factor": 4.0}}),
            ),
            ("rope_parameters.partial_rotary_factor", json!({"rope_parameters": {"partial_rotary_factor": 0.5}})),
            ("rope_parameters.full_attention", json!({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}})),
            ("rope_scaling.short_factor", json!({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}})),
        ];
        for (key, keys) in cases {
            let message = rope(keys).unwrap_err().to_string();
            assert!(message.contains(key) && message.contains("config.json"), "{message} lacks {key}");
        }
    }
}
