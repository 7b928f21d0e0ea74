//! The class that transformers 5.17 makes of a tokenizer. Most take `tokenizer.json` as it is. Some take only vocabulary, merges
//! and post-processor of it, and make normalizer, pre-tokenizer and added tokens anew: `LlamaTokenizer` by `legacy` and
//! `add_prefix_space` of `tokenizer_config.json`, say.

use serde_json::{Map, Value, json};

/// A class, by what it makes anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenizerClass {
    /// Nothing.
    AsInFile,
    GptNeoX,
    Llama,
    Qwen2,
}
use TokenizerClass::{AsInFile, GptNeoX, Llama, Qwen2};

/// Further classes that make parts anew.
const OTHERS: [&str; 99] = [
    "AlbertTokenizer",
    "BartTokenizer",
    "BarthezTokenizer",
    "BartphoTokenizer",
    "BertGenerationTokenizer",
    "BertJapaneseTokenizer",
    "BertTokenizer",
    "BertweetTokenizer",
    "BigBirdTokenizer",
    "BioGptTokenizer",
    "BlenderbotSmallTokenizer",
    "BlenderbotTokenizer",
    "ByT5Tokenizer",
    "CLIPTokenizer",
    "CTRLTokenizer",
    "CamembertTokenizer",
    "CanineTokenizer",
    "ClvpTokenizer",
    "CodeGenTokenizer",
    "CodeLlamaTokenizer",
    "CohereTokenizer",
    "ConvBertTokenizer",
    "CpmAntTokenizer",
    "CpmTokenizer",
    "DPRContextEncoderTokenizer",
    "DPRQuestionEncoderTokenizer",
    "DPRReaderTokenizer",
    "DebertaTokenizer",
    "DebertaV2Tokenizer",
    "DiaTokenizer",
    "DistilBertTokenizer",
    "ElectraTokenizer",
    "EsmTokenizer",
    "EsmcTokenizer",
    "FNetTokenizer",
    "FSMTTokenizer",
    "FastSpeech2ConformerTokenizer",
    "FlaubertTokenizer",
    "FunnelTokenizer",
    "GPT2Tokenizer",
    "GPTNeoXJapaneseTokenizer",
    "GPTSw3Tokenizer",
    "GemmaTokenizer",
    "HerbertTokenizer",
    "LEDTokenizer",
    "LasrTokenizer",
    "LayoutLMv2Tokenizer",
    "LayoutLMv3Tokenizer",
    "LayoutXLMTokenizer",
    "LukeTokenizer",
    "LxmertTokenizer",
    "M2M100Tokenizer",
    "MBart50Tokenizer",
    "MBartTokenizer",
    "MLukeTokenizer",
    "MPNetTokenizer",
    "MarianTokenizer",
    "MarkupLMTokenizer",
    "MgpstrTokenizer",
    "MobileBertTokenizer",
    "MvpTokenizer",
    "MyT5Tokenizer",
    "NllbTokenizer",
    "NougatTokenizer",
    "OpenAIGPTTokenizer",
    "PLBartTokenizer",
    "ParakeetTokenizer",
    "PegasusTokenizer",
    "PerceiverTokenizer",
    "PhobertTokenizer",
    "Pop2PianoTokenizer",
    "ProphetNetTokenizer",
    "Qwen3_5Tokenizer",
    "RagTokenizer",
    "ReformerTokenizer",
    "RemBertTokenizer",
    "RoCBertTokenizer",
    "RoFormerTokenizer",
    "RobertaTokenizer",
    "SeamlessM4TTokenizer",
    "Siglip2Tokenizer",
    "SiglipTokenizer",
    "Speech2TextTokenizer",
    "SpeechT5Tokenizer",
    "SplinterTokenizer",
    "SqueezeBertTokenizer",
    "T5Tokenizer",
    "TapasTokenizer",
    "Tipsv2Tokenizer",
    "UdopTokenizer",
    "VideoPrismTokenizer",
    "VitsTokenizer",
    "Wav2Vec2CTCTokenizer",
    "Wav2Vec2PhonemeCTCTokenizer",
    "WhisperTokenizer",
    "XGLMTokenizer",
    "XLMRobertaTokenizer",
    "XLMTokenizer",
    "XLNetTokenizer",
];

/// How Qwen2Tokenizer splits a text into words.
const WORDS_OF_QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

impl TokenizerClass {
    /// The class for a folder with these contents of `tokenizer_config.json` and `config.json`.
    ///
    /// # Errors
    /// A class that makes parts anew which moewarden does not know.
    pub(super) fn of(config: &Map<String, Value>, model: &Map<String, Value>) -> Result<Self, String> {
        let text = |map: &Map<String, Value>, key: &str| map.get(key).and_then(Value::as_str).map(str::to_owned);
        let named = text(config, "tokenizer_class").or_else(|| text(model, "tokenizer_class"));
        let of_family = match text(model, "model_type").as_deref() {
            // Whatever class it names.
            Some("mixtral" | "mistral") => return Ok(AsInFile),
            Some("olmoe") => GptNeoX,
            Some("qwen2_moe" | "qwen3_moe" | "qwen3") => Qwen2,
            _ => AsInFile,
        };
        let Some(named) = named else { return Ok(of_family) };
        match named.strip_suffix("Fast").unwrap_or(&named) {
            "LlamaTokenizer" | "Phi3Tokenizer" => Ok(Llama),
            "GPTNeoXTokenizer" => Ok(GptNeoX),
            "Qwen2Tokenizer" => Ok(Qwen2),
            other if OTHERS.contains(&other) => Err(format!(
                "tokenizer_class is {named}: transformers makes a part of that tokenizer anew, which is not supported. Where \
                 tokenizer.json alone is right, write PreTrainedTokenizerFast; or save what transformers makes of it by \
                 AutoTokenizer.from_pretrained(..).save_pretrained(..)"
            )),
            _ => Ok(AsInFile),
        }
    }

    /// The named tokens where `tokenizer_config.json` does not name them.
    pub(super) fn defaults(self) -> &'static [(&'static str, &'static str)] {
        match self {
            AsInFile => &[],
            GptNeoX => &[
                ("unk_token", "<|endoftext|>"),
                ("bos_token", "<|endoftext|>"),
                ("eos_token", "<|endoftext|>"),
                ("pad_token", "<|padding|>"),
            ],
            Llama => &[("unk_token", "<unk>"), ("bos_token", "<s>"), ("eos_token", "</s>")],
            Qwen2 => &[("unk_token", "<|endoftext|>"), ("eos_token", "<|endoftext|>"), ("pad_token", "<|endoftext|>")],
        }
    }

    /// The content of `tokenizer.json` with what the class makes anew, by `tokenizer_config.json`; the added tokens are left out.
    ///
    /// # Errors
    /// Another model than BPE, or a flag that is neither true nor false.
    pub(super) fn made_anew(
        self,
        mut tokenizer: Map<String, Value>,
        config: &Map<String, Value>,
    ) -> Result<Map<String, Value>, String> {
        let flag = |name: &str, default: bool| match config.get(name) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(Value::Null) if self != GptNeoX => Ok(default),
            Some(_) => Err(format!("{name} of tokenizer_config.json should be true or false")),
        };
        let model = tokenizer.get_mut("model").and_then(Value::as_object_mut).filter(|model| is_bpe(model));
        let Some(model) = model else {
            return Err(format!(
                "its model is not of type BPE, as the tokenizer class {self:?} needs, which tokenizer_config.json or the model's \
                 family asks for. Where tokenizer.json alone is right, set tokenizer_class of tokenizer_config.json to \
                 PreTrainedTokenizerFast"
            ));
        };
        let (vocab, merges) = (model["vocab"].take(), model["merges"].take());
        let llama = self == Llama;
        let affix = if llama { Value::Null } else { json!("") };
        tokenizer["model"] = json!({
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": affix, "end_of_word_suffix": affix,
            "fuse_unk": llama, "byte_fallback": llama, "ignore_merges": false,
        });
        tokenizer["model"]["vocab"] = vocab;
        tokenizer["model"]["merges"] = merges;
        let prefix = flag("add_prefix_space", llama)?;
        let bytes = |by_words: bool| json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": by_words});
        let (normalizer, pre_tokenizer) = match self {
            Llama => {
                let scheme = match (prefix, flag("legacy", false)?) {
                    (false, _) => "never",
                    (true, true) => "always",
                    (true, false) => "first",
                };
                (
                    Value::Null,
                    json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false}),
                )
            }
            Qwen2 => {
                let words = json!({"type": "Split", "pattern": {"Regex": WORDS_OF_QWEN2}, "behavior": "Isolated", "invert": false});
                (json!({"type": "NFC"}), json!({"type": "Sequence", "pretokenizers": [words, bytes(false)]}))
            }
            GptNeoX | AsInFile => (json!({"type": "NFC"}), bytes(true)),
        };
        let decoder = match llama {
            true => {
                let mut steps = vec![
                    json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
                    json!({"type": "ByteFallback"}),
                    json!({"type": "Fuse"}),
                ];
                steps.extend(prefix.then(|| json!({"type": "Strip", "content": " ", "start": 1, "stop": 0})));
                json!({"type": "Sequence", "decoders": steps})
            }
            false => bytes(true),
        };
        if self == GptNeoX {
            tokenizer.insert("post_processor".into(), Value::Null);
        }
        tokenizer.insert("normalizer".into(), normalizer);
        tokenizer.insert("pre_tokenizer".into(), pre_tokenizer);
        tokenizer.insert("decoder".into(), decoder);
        tokenizer.insert("added_tokens".into(), json!([]));
        Ok(tokenizer)
    }
}

fn is_bpe(model: &Map<String, Value>) -> bool {
    let is_typed = model.get("type").is_none_or(|name| name == "BPE");
    is_typed && model.get("vocab").is_some_and(Value::is_object) && model.get("merges").is_some_and(Value::is_array)
}
