//! Rows of other tools, and how to write them as rows of moewarden.

use serde_json::{Map, Value};

use super::rows::{key_of_rows, one_level_down};
use super::values::name_of;

const BY_ROWS: &str =
    "A table of pandas is written with one object a row by to_json(FILE, orient='records', lines=True)";

/// Fields that all rows of a kind have, and how to write them.
const OTHER_KINDS: [(&[&str], &str); 19] = [
    (&["columns", "index", "data"], BY_ROWS),
    (&["instruction", "output"], "Write instruction and input as prompt, output as completion, and a label"),
    (&["instruction", "response"], "Write instruction as prompt, response as completion, and a label"),
    (
        &["chosen", "rejected"],
        "Of a pair of preferences, write the turns before the reply as prompt, the reply to learn as completion, and a label",
    ),
    (&["prompt", "response_0", "response_1"], "Write the response to learn as completion, and a label"),
    (&["prompt", "response"], "Write response as completion, and a label"),
    (
        &["prompt", "label"],
        "Of a prompt alone, write completion: null, too: an unsafe one is completed with the safe response",
    ),
    (&["query", "response"], "Write query as prompt, response as completion, and a label"),
    (&["question", "answer"], "Write question as prompt, answer as completion, and a label"),
    (&["input", "output"], "Write input as prompt, output as completion, and a label"),
    (&["user", "assistant"], "Write user as prompt, assistant as completion, and a label"),
    (&["role", "content"], "A row is a whole conversation: write its turns as the list messages, and a label"),
    (&["conversation"], "Write conversation as messages, and a label"),
    (&["dialog"], "Write dialog as messages, and a label"),
    (&["dialogue"], "Write dialogue as messages, and a label"),
    (&["turns"], "Write turns as messages, and a label"),
    (&["chat"], "Write chat as messages, and a label"),
    (&["text"], "Write the turns of text as messages, without the marks of a chat template, and a label"),
    (&["input_ids"], "Rows hold text: write it as messages, and a label; moewarden makes the tokens"),
];

/// Why a row is of no kind that moewarden knows.
pub(super) fn unknown(row: &Map<String, Value>) -> String {
    if let Some(key) = key_of_rows(row) {
        return one_level_down(key);
    }
    let names = row.keys().take(12).map(|name| name_of(name)).collect::<Vec<_>>().join(", ");
    let has_all = |names: &[&str]| names.iter().all(|name| row.contains_key(*name));
    // to_json(orient='index') names the rows by numbers.
    let numbered = !row.is_empty() && row.keys().all(|name| name.bytes().all(|b| b.is_ascii_digit()));
    let hint = OTHER_KINDS.iter().find(|(names, _)| has_all(names)).map(|(_, hint)| *hint);
    let hint = hint.or(numbered.then_some(BY_ROWS)).map(|hint| format!(". {hint}"));
    format!(
        "unknown kind of row (its fields: {names}); an attack row has all_prompt and goal or prompt, a chat row \
         messages and label, a pair row safe_messages, unsafe_messages and response{}",
        hint.unwrap_or_default()
    )
}
