//! Writes `expert_gradients.pkl`, a Python pickle. There is no reader: unpickling a file can execute code from it.
//!
//! Protocol 2, whose opcodes are described in CPython's `pickletools`:
//! `{round: {"experts": [(layer, expert), ..], "gradients": {(layer, expert): float, ..}}, ..}`.

use crate::experts::ExpertId;

/// The entry of one round.
#[derive(Debug, Clone, PartialEq)]
pub struct RoundGradients {
    /// Round, from 1.
    pub round: usize,
    /// The selected experts, best first.
    pub experts: Vec<ExpertId>,
    /// Scores by expert, in the order of the Python dict.
    pub gradients: Vec<(ExpertId, f64)>,
}

/// The bytes of the pickle.
pub fn gradients_pickle(rounds: &[RoundGradients]) -> Vec<u8> {
    let mut out = Vec::from(b"\x80\x02".as_slice()); // PROTO 2
    dict(&mut out, rounds, |out, round| {
        int(out, round.round);
        out.extend(b"}("); // EMPTY_DICT MARK
        text(out, "experts");
        out.extend(b"]("); // EMPTY_LIST MARK
        round.experts.iter().for_each(|id| pair(out, *id));
        out.push(b'e'); // APPENDS
        text(out, "gradients");
        dict(out, &round.gradients, |out, (id, value)| {
            pair(out, *id);
            out.push(b'G'); // BINFLOAT
            out.extend(value.to_be_bytes());
        });
        out.push(b'u'); // SETITEMS
    });
    out.push(b'.'); // STOP
    out
}

/// Writes a dict; `item` writes the key and the value of one item.
fn dict<T>(out: &mut Vec<u8>, items: &[T], item: impl Fn(&mut Vec<u8>, &T)) {
    out.extend(b"}("); // EMPTY_DICT MARK
    items.iter().for_each(|x| item(out, x));
    out.push(b'u'); // SETITEMS
}

fn pair(out: &mut Vec<u8>, id: ExpertId) {
    int(out, id.layer);
    int(out, id.expert);
    out.push(b'\x86'); // TUPLE2
}

fn int(out: &mut Vec<u8>, n: usize) {
    if let Ok(n) = u8::try_from(n) {
        out.extend([b'K', n]); // BININT1
    } else {
        out.push(b'J'); // BININT
        out.extend(i32::try_from(n).expect("layers, experts and rounds are fewer than 2^31").to_le_bytes());
    }
}

fn text(out: &mut Vec<u8>, s: &str) {
    out.push(b'X'); // BINUNICODE
    out.extend((s.len() as u32).to_le_bytes());
    out.extend(s.as_bytes());
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn example() -> Vec<RoundGradients> {
        let gradients = vec![((0, 1).into(), 0.1), ((47, 300).into(), -1.5e-7), ((1, 0).into(), f64::MIN_POSITIVE)];
        let full = RoundGradients { round: 1, experts: vec![(47, 300).into(), (0, 1).into()], gradients };
        vec![full, RoundGradients { round: 70_000, experts: vec![], gradients: vec![] }]
    }

    #[test]
    fn bytes_of_a_small_pickle() {
        let rounds = [RoundGradients { round: 1, experts: vec![(2, 3).into()], gradients: vec![((2, 3).into(), 1.0)] }];
        let expected = b"\x80\x02}(K\x01}(X\x07\0\0\0experts](K\x02K\x03\x86eX\x09\0\0\0gradients}(K\x02K\x03\x86G\x3f\xf0\0\0\0\0\0\0uuu.";
        assert_eq!(gradients_pickle(&rounds), expected);
    }

    #[test]
    fn python_unpickles_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("expert_gradients.pkl");
        std::fs::write(&path, gradients_pickle(&example())).unwrap();
        let script = "import pickle, sys; print(repr(pickle.load(open(sys.argv[1], 'rb'))))";
        let Ok(output) = Command::new("python3").args(["-c", script]).arg(&path).output() else {
            println!("skipped: python3 is not installed");
            return;
        };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let expected = "{1: {'experts': [(47, 300), (0, 1)], 'gradients': {(0, 1): 0.1, (47, 300): -1.5e-07, \
                        (1, 0): 2.2250738585072014e-308}}, 70000: {'experts': [], 'gradients': {}}}";
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), expected);
    }
}
