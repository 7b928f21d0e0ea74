//! Routing traces of an inference server: which experts each token of a generation was routed to, as vLLM
//! (`enable_return_routed_experts`) and SGLang (`return_routed_experts`) return them.
//!
//! JSONL or a JSON array, one row a reply:
//!
//! | field | value |
//! |---|---|
//! | `verdict` | `unsafe` or `comply`: a reply that complied with an unsafe prompt; `safe` or `refuse`: one to compare it with |
//! | `prompt_tokens` | number of tokens of the prompt: the tokens after them were generated |
//! | `routed_experts` | numbers of the experts `[tokens, layers, K]`: nested lists, or base64 of little-endian int32 |
//! | `shape` | `[tokens, layers, K]`; needed for base64 |
//! | `id` | optional: an unsafe and a safe row of the same id are compared with each other |

use std::collections::HashMap;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};

use super::rows::{self, Rows};
use super::{Dataset, Error, Example, Record};

/// The shape that the traces of a model have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceShape {
    /// MoE layers, L.
    pub layers: usize,
    /// Experts of a layer, E.
    pub num_experts: usize,
    /// Experts of a token, K.
    pub top_k: usize,
}

/// What is counted of traces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceUse {
    /// Tokens at the end of each prompt that are counted besides the generated ones. A server that has cached a prompt returns
    /// no routing of its tokens.
    pub prompt_tokens: usize,
    /// Whether replies of both verdicts are compared.
    pub both_verdicts: bool,
}

/// The routing of one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// Numbers of the experts, `[T, L, K]`.
    pub experts: Vec<u32>,
    /// Number of tokens of the prompt.
    pub prompt_tokens: usize,
    shape: TraceShape,
}

/// The traces of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct RoutingTraces {
    /// For each trace an example of as many tokens, whose tokens after the prompt carry loss; the ids are 0.
    pub data: Dataset,
    unsafe_: Vec<Option<Trace>>,
    safe: Vec<Option<Trace>>,
}

impl Trace {
    /// Number of tokens, T.
    pub fn tokens(&self) -> usize {
        self.experts.len() / (self.shape.layers * self.shape.top_k)
    }

    /// The experts of a layer, by its index among the MoE layers: `[T, K]`.
    pub fn layer(&self, index: usize) -> impl Iterator<Item = u32> + '_ {
        let (layers, k) = (self.shape.layers, self.shape.top_k);
        self.experts.chunks_exact(layers * k).flat_map(move |token| token[index * k..(index + 1) * k].iter().copied())
    }

    fn example(&self) -> Example {
        let tokens = self.tokens();
        Example { ids: vec![0; tokens], loss: (0..tokens).map(|t| t >= self.prompt_tokens).collect() }
    }
}

impl RoutingTraces {
    /// Reads the traces of a model of this shape.
    ///
    /// # Errors
    /// A file that cannot be read or is empty; the first row that does not fit, with its line; no row of a verdict that is needed.
    pub fn read(path: &Path, shape: TraceShape, usage: TraceUse) -> Result<Self, Error> {
        let text = rows::read_text(path)?;
        let mut out = Self { data: Dataset::of_records(Vec::new()), unsafe_: Vec::new(), safe: Vec::new() };
        let mut by_id = HashMap::new();
        for row in Rows::new(path, &text) {
            let (line, row) = row?;
            let error = |message| Error::row(path, line, message);
            let is_unsafe = is_unsafe(&row).map_err(error)?;
            let trace = parse(&row, shape, usage).map_err(error)?;
            let id = row.get("id").filter(|id| !id.is_null()).map(ToString::to_string);
            let known = id.as_ref().and_then(|id| by_id.get(id).copied());
            let index = known.unwrap_or_else(|| out.begin_record(line));
            let record = &mut out.data.records[index];
            let (side, reply, prompt) = match is_unsafe {
                true => (&mut out.unsafe_[index], &mut record.unsafe_reply, &mut record.unsafe_prompt),
                false => (&mut out.safe[index], &mut record.safe_reply, &mut record.safe_prompt),
            };
            if side.is_some() {
                return Err(error(format!("a second row with this verdict and the id {}", id.unwrap_or_default())));
            }
            *prompt = Some(vec![0; trace.prompt_tokens]);
            *reply = Some(trace.example());
            *side = Some(trace);
            if let Some(id) = id {
                by_id.insert(id, index);
            }
        }
        for (side, name, needed, why) in [
            (&out.unsafe_, "\"unsafe\" or \"comply\"", true, "experts are found on replies that comply"),
            (
                &out.safe,
                "\"safe\" or \"refuse\"",
                usage.both_verdicts,
                "frequencies are compared between replies of both verdicts",
            ),
        ] {
            if needed && side.iter().all(Option::is_none) {
                return Err(Error::file(path, format!("no row has the verdict {name}: {why}")));
            }
        }
        Ok(out)
    }

    fn begin_record(&mut self, line: usize) -> usize {
        self.unsafe_.push(None);
        self.safe.push(None);
        self.data.records.push(Record {
            line,
            request: String::new(),
            unsafe_reply: None,
            safe_reply: None,
            unsafe_prompt: None,
            safe_prompt: None,
            unsafe_messages: Vec::new(),
            safe_messages: Vec::new(),
        });
        self.data.records.len() - 1
    }

    /// The traces of the unsafe side of these records, in the order in which their replies are packed.
    pub fn unsafe_side(&self, records: &[usize]) -> Vec<&Trace> {
        records.iter().filter_map(|&i| self.unsafe_[i].as_ref()).collect()
    }

    /// The traces of the safe side of these records, in the order in which their replies are packed.
    pub fn safe_side(&self, records: &[usize]) -> Vec<&Trace> {
        records.iter().filter_map(|&i| self.safe[i].as_ref()).collect()
    }
}

type Parsed<T> = Result<T, String>;

fn is_unsafe(row: &Map<String, Value>) -> Parsed<bool> {
    match row.get("verdict").and_then(Value::as_str) {
        Some("unsafe" | "comply") => Ok(true),
        Some("safe" | "refuse") => Ok(false),
        _ => Err(
            "a routing trace without verdict: add \"verdict\": \"unsafe\" (or \"comply\") or \"safe\" (or \"refuse\")"
                .into(),
        ),
    }
}

fn parse(row: &Map<String, Value>, shape: TraceShape, usage: TraceUse) -> Parsed<Trace> {
    let prompt_tokens = row.get("prompt_tokens").and_then(Value::as_u64);
    let prompt_tokens =
        prompt_tokens.ok_or("a routing trace without prompt_tokens, the number of tokens of the prompt")?;
    let experts = match row.get("routed_experts") {
        Some(Value::String(text)) => of_base64(text, row.get("shape"), shape)?,
        Some(Value::Array(tokens)) => of_lists(tokens, row.get("shape"), shape)?,
        _ => return Err("a routing trace without routed_experts: base64 of int32, or lists [tokens][layers][K]".into()),
    };
    let trace = Trace { experts, prompt_tokens: usize::try_from(prompt_tokens).unwrap_or(usize::MAX), shape };
    if trace.prompt_tokens == 0 {
        return Err("prompt_tokens is 0, but a reply follows a prompt of at least one token".into());
    }
    if trace.tokens() <= trace.prompt_tokens {
        return Err(format!(
            "routed_experts has {} tokens and prompt_tokens is {}: it holds no generated token. Ask the server for the routing of \
             the reply, not of the prompt only",
            trace.tokens(),
            trace.prompt_tokens
        ));
    }
    check_experts(&trace, trace.prompt_tokens.saturating_sub(usage.prompt_tokens))?;
    Ok(trace)
}

/// Refuses experts that the model does not have, and tokens from `counted` on whose experts are not distinct.
fn check_experts(trace: &Trace, counted: usize) -> Parsed<()> {
    let TraceShape { layers, num_experts, top_k } = trace.shape;
    for (i, experts) in trace.experts.chunks_exact(top_k).enumerate() {
        let (token, layer) = (i / layers, i % layers);
        if let Some(expert) = experts.iter().find(|expert| **expert as usize >= num_experts) {
            return Err(format!(
                "token {token}, layer {layer} of routed_experts: expert {}, but the model has the experts 0 to {}",
                *expert as i32,
                num_experts - 1
            ));
        }
        let twice = (1..top_k).find(|&j| experts[..j].contains(&experts[j]));
        if let Some(j) = twice.filter(|_| token >= counted) {
            let hint = if token < trace.prompt_tokens {
                "; count generated tokens only (--routing-tokens response)"
            } else {
                ""
            };
            return Err(format!(
                "token {token}, layer {layer} of routed_experts names expert {} twice: the server did not record the routing of \
                 this token{hint}",
                experts[j]
            ));
        }
    }
    Ok(())
}

/// `[tokens, layers, K]`, checked against the model.
fn shape_of(given: &Value, shape: TraceShape) -> Parsed<usize> {
    let numbers: Option<Vec<u64>> = given.as_array().and_then(|list| list.iter().map(Value::as_u64).collect());
    let Some(&[tokens, layers, top_k]) = numbers.as_deref() else {
        return Err(format!("shape is {given}, not [tokens, layers, K]"));
    };
    check_count("layers", layers, shape.layers, "MoE layers")?;
    check_count("experts a token (K)", top_k, shape.top_k, "experts a token")?;
    usize::try_from(tokens).map_err(|e| e.to_string())
}

fn check_count(what: &str, found: u64, wanted: usize, of_model: &str) -> Parsed<()> {
    if found == wanted as u64 {
        return Ok(());
    }
    Err(format!(
        "routed_experts has {found} {what}, but the model has {wanted} {of_model}: is it the trace of another model?"
    ))
}

fn of_base64(text: &str, given: Option<&Value>, shape: TraceShape) -> Parsed<Vec<u32>> {
    let given = given.ok_or("routed_experts in base64 without its shape: add \"shape\": [tokens, layers, K]")?;
    let tokens = shape_of(given, shape)?;
    let bytes = STANDARD.decode(text).map_err(|e| format!("routed_experts is not complete, valid base64: {e}"))?;
    let wanted = tokens.checked_mul(shape.layers * shape.top_k * size_of::<i32>());
    if wanted != Some(bytes.len()) {
        return Err(format!(
            "routed_experts has {} bytes, but int32 of the shape {given} has another number",
            bytes.len()
        ));
    }
    // A negative number becomes a large one, which no model has.
    Ok(bytes.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect())
}

fn of_lists(tokens: &[Value], given: Option<&Value>, shape: TraceShape) -> Parsed<Vec<u32>> {
    if let Some(given) = given.filter(|given| !given.is_null()) {
        check_count("tokens", tokens.len() as u64, shape_of(given, shape)?, "in its shape")
            .map_err(|_| format!("routed_experts has {} tokens, but its shape is {given}", tokens.len()))?;
    }
    let mut experts = Vec::with_capacity(tokens.len() * shape.layers * shape.top_k);
    for (t, token) in tokens.iter().enumerate() {
        let place = |message: String| format!("token {t}: {message}");
        let layers = token.as_array().ok_or_else(|| place(format!("{token} is not a list of layers")))?;
        check_count("layers", layers.len() as u64, shape.layers, "MoE layers").map_err(place)?;
        for layer in layers {
            let chosen = layer.as_array().ok_or_else(|| place(format!("{layer} is not a list of experts")))?;
            check_count("experts a token (K)", chosen.len() as u64, shape.top_k, "experts a token").map_err(place)?;
            for expert in chosen {
                let number = expert.as_u64().and_then(|n| u32::try_from(n).ok());
                experts.push(number.ok_or_else(|| place(format!("{expert} is not the number of an expert")))?);
            }
        }
    }
    Ok(experts)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::exit::{self, Coded};

    const SHAPE: TraceShape = TraceShape { layers: 2, num_experts: 4, top_k: 2 };

    fn read(rows: &[Value]) -> Result<RoutingTraces, Error> {
        read_for(rows, TraceUse { prompt_tokens: 0, both_verdicts: true })
    }

    fn read_for(rows: &[Value], usage: TraceUse) -> Result<RoutingTraces, Error> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("traces.jsonl");
        std::fs::write(&path, rows.iter().map(|row| format!("{row}\n")).collect::<String>()).unwrap();
        RoutingTraces::read(&path, SHAPE, usage)
    }

    fn base64(experts: &[i32]) -> String {
        STANDARD.encode(experts.iter().flat_map(|e| e.to_le_bytes()).collect::<Vec<_>>())
    }

    fn safe() -> Value {
        json!({"verdict": "safe", "prompt_tokens": 1, "routed_experts": [[[0, 1], [2, 3]], [[1, 2], [3, 0]]]})
    }

    #[test]
    fn base64_and_lists_hold_the_same() {
        let encoded = json!({
            "verdict": "comply", "prompt_tokens": 1, "shape": [2, 2, 2], "id": 7,
            "routed_experts": base64(&[0, 1, 2, 3, 1, 2, 3, 0]),
        });
        let mut paired = safe();
        paired["id"] = json!(7);
        let traces = read(&[encoded, safe(), paired]).unwrap();
        assert_eq!(traces.data.records.len(), 2, "rows of one id are one record");
        let (unsafe_, safe) = (traces.unsafe_side(&[0, 1]), traces.safe_side(&[0, 1]));
        assert_eq!((unsafe_.len(), safe.len()), (1, 2));
        assert_eq!(unsafe_[0], safe[0]);
        assert_eq!(safe[0].layer(1).collect::<Vec<_>>(), [2, 3, 3, 0]);
        let example = traces.data.records[0].unsafe_reply.as_ref().unwrap();
        assert_eq!((example.ids.len(), &example.loss[..]), (2, &[false, true][..]));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let with = |key: &str, value: Value| {
            let mut row = json!({
                "verdict": "unsafe", "prompt_tokens": 1, "shape": [2, 2, 2],
                "routed_experts": base64(&[0, 1, 2, 3, 1, 2, 3, 0]),
            });
            row[key] = value;
            row
        };
        let whole = base64(&[0, 1, 2, 3, 1, 2, 3, 0]);
        let cases = [
            (with("verdict", json!("maybe")), "without verdict"),
            (with("prompt_tokens", json!(null)), "prompt_tokens"),
            (with("prompt_tokens", json!(0)), "at least one token"),
            (with("prompt_tokens", json!(2)), "no generated token"),
            (with("routed_experts", json!(3)), "without routed_experts"),
            (with("shape", json!(null)), "null"),
            (with("shape", json!([2, 3, 2])), "3 layers, but the model has 2 MoE layers"),
            (with("shape", json!([2, 2, 8])), "8 experts a token (K), but the model has 2"),
            (with("shape", json!([3, 2, 2])), "has 32 bytes"),
            (with("shape", json!([u64::MAX, 2, 2])), "has 32 bytes"),
            (with("routed_experts", json!(whole[..whole.len() - 3])), "base64"),
            (with("routed_experts", json!(base64(&[0, 1, 2, 3, 1, 2, 3]))), "has 28 bytes"),
            (
                with("routed_experts", json!(base64(&[0, 1, 2, 3, 1, 2, 3, 4]))),
                "token 1, layer 1 of routed_experts: expert 4",
            ),
            (with("routed_experts", json!(base64(&[0, 1, 2, 3, 1, 2, 3, -1]))), "expert -1"),
            (with("routed_experts", json!(base64(&[0, 1, 2, 3, 1, 1, 3, 0]))), "names expert 1 twice"),
            (with("routed_experts", json!([[[0, 1], [2, 3]]])), "1 tokens, but its shape"),
            (with("routed_experts", json!([[[0, 1]], [[0, 1]]])), "token 0: routed_experts has 1 layers"),
            (
                with("routed_experts", json!([[[0, 1], [2]], [[0, 1], [2, 3]]])),
                "token 0: routed_experts has 1 experts a token",
            ),
            (with("routed_experts", json!([[[0, 1], [2, -3]], [[0, 1], [2, 3]]])), "-3 is not the number"),
        ];
        for (row, message) in cases {
            let error = read(&[safe(), row.clone()]).expect_err(message);
            assert_eq!(error.exit_code(), exit::DATA);
            let text = error.to_string();
            assert!(text.contains("traces.jsonl:2:") && text.contains(message), "{row}: {text}");
        }
        let error = read(&[safe()]).unwrap_err().to_string();
        assert!(error.contains("no row has the verdict \"unsafe\""), "{error}");
        let mut comply = safe();
        comply["verdict"] = json!("comply");
        assert!(read(&[comply.clone()]).is_err(), "both verdicts are needed");
        let alone = TraceUse { prompt_tokens: 0, both_verdicts: false };
        assert!(read_for(&[comply.clone()], alone).is_ok());
        // A cached prompt token: an error only if it is counted.
        comply["routed_experts"] = json!([[[0, 0], [0, 0]], [[1, 2], [3, 0]]]);
        assert!(read_for(&[comply.clone()], alone).is_ok());
        let error = read_for(&[comply], TraceUse { prompt_tokens: 1, ..alone }).unwrap_err().to_string();
        assert!(error.contains("token 0, layer 0") && error.contains("--routing-tokens response"), "{error}");
        let mut twice = safe();
        twice["id"] = json!("a");
        let error = read(&[twice.clone(), twice]).unwrap_err().to_string();
        assert!(error.contains("a second row"), "{error}");
    }
}
