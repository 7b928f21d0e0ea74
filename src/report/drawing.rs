//! What all drawings have in common: the SVG element with its text alternative, and their style on white and on black paper.

use super::markup::escape;
use super::scale;

const STYLE: &str = include_str!("../../assets/report/drawing.css");

/// The beginning of a drawing: its element, title and description. `id` must be unique in the page; the visible title begins at
/// `left`.
///
/// # Panics
/// If `id` has other characters than ASCII letters, digits and hyphens.
pub fn open(id: &str, title: &str, description: &str, [width, height]: [f64; 2], left: f64) -> String {
    assert!(id.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'), "{id:?} is not a valid id");
    let (title, description) = (escape(title), escape(description));
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"drawing\" role=\"img\" aria-labelledby=\"{id}-title {id}-desc\" \
         width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" font-family=\"system-ui, sans-serif\" \
         font-size=\"12\">\n<title id=\"{id}-title\">{title}</title>\n<desc id=\"{id}-desc\">{description}</desc>\n\
         <text class=\"title\" x=\"{left}\" y=\"20\" font-size=\"14\" font-weight=\"bold\">{title}</text>\n"
    )
}

/// The title of a drawing that [`open`] began, escaped.
pub fn title_of(svg: &str) -> &str {
    let (_, rest) = svg.split_once("-title\">").expect("a drawing has a title");
    rest.split_once("</title>").expect("a title ends").0
}

/// The style of all drawings. Their attributes hold where there is none.
pub fn style() -> String {
    format!("{STYLE}{}", scale::dark_style())
}

/// A drawing as a file of its own.
pub fn standalone(svg: &str) -> String {
    let (open, rest) = svg.split_once('\n').expect("a drawing begins with a line of its own");
    format!("{open}\n<style>\n{}</style>\n{rest}", style())
}
