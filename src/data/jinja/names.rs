//! The names that a chat template uses, found by its tokens: comments, raw blocks and ordinary text name nothing.

use std::collections::HashSet;

use super::source::tags;
use super::tokens::Token::{self, Name, Sign, Text};
use super::tokens::{is_variable, tokens};

/// Names of fields and variables in a template.
#[derive(Debug, Default)]
pub(in crate::data) struct Names {
    fields: HashSet<String>,
    variables: HashSet<String>,
}

/// Filters and methods that take the name of a field as their first argument.
const BY_NAME: [&str; 10] =
    ["get", "pop", "attr", "map", "selectattr", "rejectattr", "groupby", "sort", "sum", "unique"];

impl Names {
    /// The names in a template.
    pub(in crate::data) fn of(source: &str) -> Self {
        let only_tokens = |tag| tokens(tag).into_iter().map(|placed| placed.token).collect();
        let tags: Vec<Vec<Token<'_>>> = tags(source).map(only_tokens).collect();
        let namespaces: HashSet<&str> = tags.iter().filter_map(|tag| namespace(tag)).collect();
        let mut names = Self::default();
        let mut set_before = HashSet::new();
        for tag in &tags {
            names.fields.extend((0..tag.len()).filter_map(|i| field(tag, i, &namespaces)).map(str::to_owned));
            if let [Name("set" | "with"), Name(target), Sign('='), value @ ..] = &tag[..] {
                if !set_before.contains(target) && value.iter().enumerate().any(|(i, _)| is_variable(value, i, target))
                {
                    names.variables.insert((*target).to_owned());
                }
                set_before.insert(*target);
            }
        }
        names
    }

    /// Whether the template uses a field of this name, of anything but a namespace.
    pub(in crate::data) fn has_field(&self, name: &str) -> bool {
        self.fields.contains(name)
    }

    /// Variables that the template reads to set them anew: `{% set x = x if x is defined else 1 %}`.
    pub(in crate::data) fn read_and_set(&self) -> impl Iterator<Item = &str> {
        self.variables.iter().map(String::as_str)
    }
}

/// The variable of `{% set NAME = namespace(...) %}`.
fn namespace<'a>(tag: &[Token<'a>]) -> Option<&'a str> {
    match tag {
        [Name("set"), Name(target), Sign('='), Name("namespace"), Sign('('), ..] => Some(target),
        _ => None,
    }
}

/// The field that token `i` names: `.name`, `['name']`, `get('name')`, `attribute='name'`, `'name' in`, or an element of a list
/// and the value of a variable, which may be used as one.
fn field<'a>(tag: &[Token<'a>], i: usize, namespaces: &HashSet<&str>) -> Option<&'a str> {
    let before = |n: usize| i.checked_sub(n).map(|at| tag[at]);
    let of_namespace = || match (before(2), before(3)) {
        (Some(Name(root)), parent) => namespaces.contains(root) && parent != Some(Sign('.')),
        _ => false,
    };
    match (tag[i], before(1)) {
        (Name(name), Some(Sign('.'))) => (!of_namespace()).then_some(name),
        (Text(text), before_it) => {
            let is_named = match before_it {
                Some(Sign('[')) => matches!(tag.get(i + 1), Some(Sign(',' | ']'))) && !of_namespace(),
                Some(Sign('(')) => {
                    let listed = matches!(tag.get(i + 1), Some(Sign(',')));
                    match before(2) {
                        Some(Name("in" | "if" | "else" | "and" | "or" | "not")) => listed,
                        Some(Name(function)) => BY_NAME.contains(&function),
                        _ => listed,
                    }
                }
                Some(Sign(',')) => matches!(tag.get(i + 1), Some(Sign(',' | ']' | ')'))),
                Some(Sign('=')) => before(2).is_some_and(|target| matches!(target, Name(_))),
                _ => false,
            };
            (is_named || matches!(tag.get(i + 1..), Some([Name("in"), ..] | [Name("not"), Name("in"), ..])))
                .then_some(text)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_named_by_what_can_read_it() {
        for read in [
            "{{ m.thinking }}",
            "{%- if m['thinking'] -%}{% endif %}",
            "{{ m[\"thinking\"] }}",
            "{{ m.get('thinking', '') }}",
            "{% if 'thinking' in m %}{% endif %}",
            "{% if 'thinking' not in m %}{% endif %}",
            "{{ messages | map(attribute='thinking') | join }}",
            "{{ messages | selectattr('thinking') | list }}",
            "{{ m | attr('thinking') }}",
            "{% for key in ['reasoning', 'thinking'] %}{{ m[key] }}{% endfor %}",
            "{% for key in ('thinking', 'reasoning') %}{{ m[key] }}{% endfor %}",
            "{% set key = 'thinking' %}{{ m[key] }}",
            "{% set ns = namespace(m=1) %}{{ x.ns.thinking }}",
            "{{ messages[-1].thinking }}",
            "{{ (a or b).thinking }}",
        ] {
            assert!(Names::of(read).has_field("thinking"), "{read}");
        }
        for other in [
            "thinking",
            "{# m.thinking #}",
            "{#- {{ m['thinking'] }} -#}",
            "{% raw %}{{ m.thinking }}{% endraw %}",
            "{{ 'thinking' }}",
            "{{ '<m.thinking>' }}",
            "{{ thinking }}",
            "{% set thinking = 1 %}",
            "{% set ns = namespace(thinking=1) %}{% set ns.thinking = 2 %}{{ ns.thinking ~ ns['thinking'] }}",
            "{{ m.no_thinking ~ m.thinking_on }}",
            "{% if m.role == 'thinking' %}{% endif %}",
            "{{ raise_exception('thinking') }}",
            "{{ m.x | default('thinking') }}",
            "{{ 'it\\'s m.thinking' }}",
        ] {
            assert!(!Names::of(other).has_field("thinking"), "{other}");
        }
    }

    #[test]
    fn a_variable_that_is_read_to_be_set_is_read() {
        for (source, read) in [
            ("{% set x = x if x is defined else 1 %}", true),
            ("{%- with x = x | default(1) -%}{% endwith %}", true),
            ("{% set x = m.x %}", false),
            ("{% set x = f(x=1) %}", false),
            ("{% set x = 1 %}{% set x = x + 1 %}", false),
            ("{% set x = y == x %}", true),
        ] {
            assert_eq!(Names::of(source).read_and_set().any(|name| name == "x"), read, "{source}");
        }
    }
}
