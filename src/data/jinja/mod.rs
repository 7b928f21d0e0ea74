//! minijinja configured as Hugging Face transformers configures Jinja2 for chat templates, with limits on the resources
//! that a template can use.
//!
//! | file | what differs from plain minijinja |
//! |---|---|
//! | `source`, `tokens` | the source: line endings, `{% generation %}`, which transformers adds, slices, `%` of a text, escapes |
//! | `printing`, `json` | values as Python prints them; `tojson` |
//! | `filters`, `methods`, `arguments` | filters of Jinja2; methods of Python's `str`, `dict` and `list`; their arguments |
//! | `clock` | `strftime_now` |
//! | `cycler` | `cycler` |
//! | `limits` | the size of what filters and methods make |
//! | `names` | which fields and variables a template names |

mod arguments;
mod clock;
mod cycler;
mod filters;
mod json;
mod limits;
mod methods;
mod names;
mod printing;
mod source;
mod tokens;

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Output, State, Value};

pub(super) use names::Names;
pub(super) use printing::python_float;
pub(super) use source::{check, to_minijinja};

/// Marks before and after the output of a `{% generation %}` block: Unicode noncharacters, which ordinary text does not
/// hold.
pub(super) const GENERATION: [char; 2] = ['\u{10fffe}', '\u{10ffff}'];
/// Maximum number of instructions of one rendering; real templates take some hundreds per turn. It also bounds how deep
/// values can be nested: a level takes some eight instructions.
const FUEL: u64 = 2_000_000;

/// The minijinja environment for chat templates.
pub(super) fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.expect("the delimiters are the usual ones"));
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_fuel(Some(FUEL));
    env.set_debug(false); // or errors hold all values of the template
    env.set_formatter(print);
    env.set_unknown_method_callback(methods::python_method);
    filters::add(&mut env);
    env.add_filter("tojson", json::tojson);
    env.add_filter("__generation", |text: String| format!("{}{text}{}", GENERATION[0], GENERATION[1]));
    env.add_function("cycler", cycler::cycler);
    env.add_function("joiner", minijinja_contrib::globals::joiner);
    env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    // The clock is read once, in UTC, so that all renderings of this process see the same date.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    env.add_function("strftime_now", move |format: String| clock::strftime(now, &format));
    env
}

/// Writes the value of `{{ }}` as Python prints it.
fn print(out: &mut Output<'_>, state: &mut State, value: &Value) -> Result<(), Error> {
    let escapes = *state.auto_escape() != AutoEscape::None && !value.is_safe();
    let written = match value.kind() {
        _ if escapes => out.write_str(&filters::escape(&printing::python_str(value)?)),
        ValueKind::Number | ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => {
            out.write_str(&printing::python_str(value)?)
        }
        _ => write!(out, "{value}"),
    };
    written.map_err(Error::from)
}
