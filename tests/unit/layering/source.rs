//! A reader of Rust sources: the paths that a file names, and the files that define what the paths lead to.

use std::collections::{BTreeMap, BTreeSet};

/// Keywords before the name of an item.
const ITEMS: [&str; 8] = ["struct", "enum", "fn", "trait", "type", "const", "static", "union"];

/// A path of modules from the root of the crate.
pub type Modules = Vec<String>;

/// An import or another path in a source, from the root of the crate.
#[derive(Clone, Debug, PartialEq)]
pub struct Named {
    pub line: usize,
    pub path: Modules,
}

/// `use path as name;`, with a path from the root of the crate.
#[derive(Clone, Debug)]
struct Use {
    line: usize,
    path: Modules,
    name: String,
    is_glob: bool,
    is_public: bool,
}

/// A source file.
pub struct File {
    /// As messages show it.
    pub name: String,
    pub module: Modules,
    uses: Vec<Use>,
    /// Paths outside of `use`.
    paths: Vec<Named>,
    /// Identifiers outside of `use`.
    words: BTreeSet<String>,
    /// Names of the items that the file defines.
    items: BTreeSet<String>,
    /// Whether the file holds anything but `mod name;` and `use`.
    defines: bool,
}

impl File {
    /// Reads a source; `with_tests`: also what only tests compile.
    pub fn parse(name: &str, module: Modules, source: &str, with_tests: bool) -> Self {
        let mut tokens = tokens(source);
        if !with_tests {
            tokens = without_tests(&tokens);
        }
        let tokens = without_attributes(&tokens);
        let mut file = Self {
            name: name.into(),
            module,
            uses: Vec::new(),
            paths: Vec::new(),
            words: BTreeSet::new(),
            items: BTreeSet::new(),
            defines: false,
        };
        let is_declaration = |w: &[Token]| w[0].is("mod") && w[2].is(";");
        let children: Vec<String> =
            tokens.windows(3).filter(|w| is_declaration(w)).map(|w| w[1].text.clone()).collect();
        file.read(&tokens, &children);
        file
    }

    /// Walks through the tokens; `children` are the modules in files of their own that this file declares.
    fn read(&mut self, tokens: &[Token], children: &[String]) {
        // For each open brace, whether it opened a module.
        let mut braces: Vec<bool> = Vec::new();
        let mut module = self.module.clone();
        let mut at = 0;
        while at < tokens.len() {
            let next = |i: usize| tokens.get(at + i).map_or("", |token| token.text.as_str());
            let before = if at == 0 { "" } else { tokens[at - 1].text.as_str() };
            match tokens[at].text.as_str() {
                "use" if next(1) != "<" => {
                    let end = at + tokens[at..].iter().position(|t| t.is(";")).expect("a `;` after `use`");
                    let is_public = before == "pub" || before == ")";
                    self.read_use(&tokens[at + 1..end], &module, children, is_public);
                    at = end + 1;
                    continue;
                }
                "mod" if next(2) == ";" => {
                    at += 3;
                    continue;
                }
                "mod" if next(2) == "{" => {
                    module.push(next(1).into());
                    braces.push(true);
                    at += 3;
                    continue;
                }
                "{" => braces.push(false),
                "}" => {
                    if braces.pop() == Some(true) {
                        module.pop();
                    }
                }
                word if is_identifier(word) && before != "::" && next(1) == "::" => {
                    let mut path = vec![word.to_owned()];
                    while next(2 * path.len() - 1) == "::" && is_identifier(next(2 * path.len())) {
                        path.push(next(2 * path.len()).into());
                    }
                    self.words.extend(path.iter().cloned());
                    self.defines = true;
                    if let Some(path) = absolute(&path, &module, &self.module, children) {
                        self.paths.push(Named { line: tokens[at].line, path });
                    } else {
                        // Perhaps the name of an imported module: see `Crate::named`.
                        self.paths.push(Named { line: tokens[at].line, path: [&["".into()], &path[..]].concat() });
                    }
                    let last = path.len() - 1;
                    at += 2 * last + 1;
                    continue;
                }
                "pub" | "crate" | "super" | "(" | ")" | "in" | "::" => {}
                word => {
                    self.defines = true;
                    // Not the methods of types.
                    if braces.iter().all(|&is_module| is_module) {
                        if ITEMS.contains(&word) {
                            self.items.insert(next(1).into());
                        } else if word == "macro_rules" {
                            self.items.insert(next(2).into());
                        }
                    }
                    self.words.insert(word.into());
                }
            }
            at += 1;
        }
    }

    fn read_use(&mut self, tree: &[Token], module: &[String], children: &[String], is_public: bool) {
        let mut leaves = Vec::new();
        use_tree(tree, &[], &mut leaves);
        for (line, path, name) in leaves {
            let is_glob = path.last().is_some_and(|last| last == "*");
            let path = path[..path.len() - usize::from(is_glob)].to_vec();
            if let Some(path) = absolute(&path, module, &self.module, children) {
                self.uses.push(Use { line, path, name, is_glob, is_public });
            }
        }
    }

    /// The paths that this file names, from the root of the crate; re-exports that the file does not use itself are left
    /// out unless `with_exports`.
    pub fn named(&self, with_exports: bool) -> Vec<Named> {
        let mut all = Vec::new();
        for u in &self.uses {
            if with_exports || !u.is_public || self.words.contains(&u.name) {
                all.push(Named { line: u.line, path: u.path.clone() });
            }
        }
        for named in &self.paths {
            match named.path.split_first() {
                Some((first, rest)) if first.is_empty() => {
                    let imported = self.uses.iter().find(|u| !u.is_glob && u.name == rest[0]);
                    if let Some(u) = imported {
                        all.push(Named { line: named.line, path: [&u.path, &rest[1..]].concat() });
                    }
                }
                _ => all.push(named.clone()),
            }
        }
        all.sort_by_key(|named| named.line);
        all
    }
}

/// Files by their modules.
pub struct Crate {
    pub files: Vec<File>,
    at: BTreeMap<Modules, usize>,
}

/// A file that names another, with the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Edge {
    pub from: usize,
    pub to: usize,
    pub line: usize,
}

impl Crate {
    pub fn new(files: Vec<File>) -> Self {
        let at = files.iter().enumerate().map(|(i, file)| (file.module.clone(), i)).collect();
        Self { files, at }
    }

    /// The file that defines what a path leads to. Re-exports are followed; `None`: a module that only declares and
    /// re-exports, or nothing of this crate.
    fn target(&self, path: &[String], depth: usize) -> Option<usize> {
        let known = (0..=path.len()).rev().find(|&n| self.at.contains_key(&path[..n]))?;
        let file = &self.files[self.at[&path[..known]]];
        if let Some(item) = path.get(known)
            && !file.items.contains(item)
            && depth < 8
        {
            // Children see private imports, too.
            if let Some(u) = file.uses.iter().find(|u| !u.is_glob && u.name == *item) {
                return self.target(&[&u.path, &path[known + 1..]].concat(), depth + 1);
            }
            for u in file.uses.iter().filter(|u| u.is_glob) {
                let from = self.at.get(&u.path).map(|&i| &self.files[i]);
                if from.is_some_and(|from| from.items.contains(item) || from.uses.iter().any(|u| u.name == *item)) {
                    return self.target(&[&u.path, &path[known..]].concat(), depth + 1);
                }
            }
        }
        file.defines.then_some(self.at[&path[..known]])
    }

    /// The first line of each file that names something in another file. A module and the modules inside it are one thing:
    /// children may use their parent's items, so that what a parent takes from its children is left out.
    pub fn edges(&self) -> Vec<Edge> {
        let mut edges: Vec<Edge> = Vec::new();
        for (from, file) in self.files.iter().enumerate().filter(|(_, file)| file.defines) {
            for named in file.named(false) {
                let Some(to) = self.target(&named.path, 0) else { continue };
                let is_inside = self.files[to].module.starts_with(&file.module);
                if !is_inside && !edges.iter().any(|e| (e.from, e.to) == (from, to)) {
                    edges.push(Edge { from, to, line: named.line });
                }
            }
        }
        edges
    }

    /// One shortest cycle of each group of files that reach each other, as `a.rs:LINE → b.rs:LINE → a.rs`.
    pub fn cycles(&self) -> Vec<String> {
        let edges = self.edges();
        let mut shortest: Vec<Vec<Edge>> =
            (0..self.files.len()).filter_map(|file| cycle_through(file, &edges)).collect();
        shortest.sort_by_key(Vec::len);
        let mut found: Vec<String> = Vec::new();
        let mut reported = BTreeSet::new();
        for cycle in shortest {
            if reported.contains(&cycle[0].from) {
                continue;
            }
            let group = reachable(cycle[0].from, &edges);
            reported.extend(group.iter().copied().filter(|&file| reachable(file, &edges).contains(&cycle[0].from)));
            let steps: String =
                cycle.iter().map(|edge| format!("{}:{} → ", self.files[edge.from].name, edge.line)).collect();
            found.push(steps + &self.files[cycle[0].from].name);
        }
        found
    }
}

/// The files that can be reached from one by at least one edge.
fn reachable(from: usize, edges: &[Edge]) -> BTreeSet<usize> {
    let mut seen = BTreeSet::new();
    let mut open = vec![from];
    while let Some(file) = open.pop() {
        open.extend(edges.iter().filter(|e| e.from == file && seen.insert(e.to)).map(|e| e.to));
    }
    seen
}

/// A shortest way from a file back to it, by breadth-first search.
fn cycle_through(start: usize, edges: &[Edge]) -> Option<Vec<Edge>> {
    let mut came_by: BTreeMap<usize, Edge> = BTreeMap::new();
    let mut open = std::collections::VecDeque::from([start]);
    while let Some(file) = open.pop_front() {
        for edge in edges.iter().filter(|edge| edge.from == file) {
            if edge.to == start {
                let mut way = vec![*edge];
                while way[0].from != start {
                    way.insert(0, came_by[&way[0].from]);
                }
                return Some(way);
            }
            came_by.entry(edge.to).or_insert_with(|| {
                open.push_back(edge.to);
                *edge
            });
        }
    }
    None
}

/// A path as written in `module` of a file, from the root of the crate; `None` if it does not begin with `crate`, `super`,
/// `self` or a module that the file declares.
fn absolute(path: &[String], module: &[String], file: &[String], children: &[String]) -> Option<Modules> {
    let (first, rest) = path.split_first()?;
    let mut base = match first.as_str() {
        "crate" => Vec::new(),
        "self" => module.to_vec(),
        "super" => module[..module.len().checked_sub(1)?].to_vec(),
        child if module == file && children.iter().any(|name| name == child) => [file, &[child.into()]].concat(),
        _ => return None,
    };
    let mut rest = rest;
    while rest.first().is_some_and(|name| name == "super") {
        base.pop()?;
        rest = &rest[1..];
    }
    Some([base, rest.to_vec()].concat())
}

/// The paths of a `use` tree with their lines and the names that they get here.
fn use_tree(tree: &[Token], prefix: &[String], leaves: &mut Vec<(usize, Modules, String)>) {
    let Some(first) = tree.first() else { return };
    let mut path = prefix.to_vec();
    for (i, token) in tree.iter().enumerate() {
        match token.text.as_str() {
            "::" => {}
            "{" => {
                let list = &tree[i + 1..tree.len() - 1];
                let (mut depth, mut start) = (0, 0);
                for (at, token) in list.iter().enumerate() {
                    match token.text.as_str() {
                        "{" => depth += 1,
                        "}" => depth -= 1,
                        "," if depth == 0 => {
                            use_tree(&list[start..at], &path, leaves);
                            start = at + 1;
                        }
                        _ => {}
                    }
                }
                return use_tree(&list[start..], &path, leaves);
            }
            "as" => {
                let name = tree[i + 1].text.clone();
                return leaves.push((first.line, path, name));
            }
            "self" if !prefix.is_empty() && i == 0 => {}
            name => path.push(name.into()),
        }
    }
    let name = path.last().cloned().unwrap_or_default();
    leaves.push((first.line, path, name));
}

/// An identifier, `::`, or another character.
#[derive(Clone, Debug)]
struct Token {
    line: usize,
    text: String,
}

impl Token {
    fn is(&self, text: &str) -> bool {
        self.text == text
    }
}

fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// The tokens of a source without comments. String and character literals become `"`.
fn tokens(source: &str) -> Vec<Token> {
    let chars: Vec<char> = source.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let (mut found, mut line, mut i) = (Vec::new(), 1, 0);
    while i < chars.len() {
        let start = i;
        let mut text = None;
        match at(i) {
            '/' if at(i + 1) == '/' => {
                while i < chars.len() && at(i) != '\n' {
                    i += 1;
                }
            }
            '/' if at(i + 1) == '*' => {
                let mut depth = 0;
                loop {
                    match (at(i), at(i + 1)) {
                        ('/', '*') => (depth, i) = (depth + 1, i + 2),
                        ('*', '/') => (depth, i) = (depth - 1, i + 2),
                        _ => i += 1,
                    }
                    if depth == 0 || i >= chars.len() {
                        break;
                    }
                }
            }
            '"' => {
                i += 1;
                while i < chars.len() && at(i) != '"' {
                    i += if at(i) == '\\' { 2 } else { 1 };
                }
                i += 1;
                text = Some("\"".into());
            }
            'r' if raw_string_hashes(&chars[i + 1..]).is_some() => {
                let hashes = raw_string_hashes(&chars[i + 1..]).unwrap_or(0);
                let end: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
                i += hashes + 2;
                while i < chars.len() && !chars[i..].starts_with(&end) {
                    i += 1;
                }
                i += end.len();
                text = Some("\"".into());
            }
            // A character, not a lifetime.
            '\'' if at(i + 1) == '\\' || at(i + 2) == '\'' => {
                i += if at(i + 1) == '\\' { 3 } else { 2 };
                while i < chars.len() && at(i) != '\'' {
                    i += 1;
                }
                i += 1;
                text = Some("\"".into());
            }
            c if c.is_alphabetic() || c == '_' => {
                while at(i).is_alphanumeric() || at(i) == '_' {
                    i += 1;
                }
                text = Some(chars[start..i].iter().collect());
            }
            ':' if at(i + 1) == ':' => {
                i += 2;
                text = Some("::".into());
            }
            c => {
                i += 1;
                text = (!c.is_whitespace()).then(|| c.into());
            }
        }
        let end = i.min(chars.len());
        found.extend(text.map(|text| Token { line, text }));
        line += chars[start..end].iter().filter(|&&c| c == '\n').count();
    }
    found
}

/// The number of `#` of a raw string whose `r` comes before this.
fn raw_string_hashes(after: &[char]) -> Option<usize> {
    let hashes = after.iter().take_while(|&&c| c == '#').count();
    (after.get(hashes) == Some(&'"')).then_some(hashes)
}

/// The end of the group that begins at `start` with one of `([{`: the index after its last token.
fn group_end(tokens: &[Token], start: usize) -> usize {
    let mut depth = 0;
    for (i, token) in tokens.iter().enumerate().skip(start) {
        match token.text.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return i + 1;
        }
    }
    tokens.len()
}

/// Without the items behind `#[cfg(test)]`.
fn without_tests(tokens: &[Token]) -> Vec<Token> {
    const CFG_TEST: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut kept = Vec::new();
    let mut i = 0;
    while i < tokens.len() {
        if tokens[i..].len() >= 7 && CFG_TEST.iter().zip(&tokens[i..]).all(|(text, token)| token.is(text)) {
            // Up to the item's `;` or its block.
            i += 7;
            while i < tokens.len() && !tokens[i].is(";") && !tokens[i].is("{") {
                i = if tokens[i].is("(") || tokens[i].is("[") { group_end(tokens, i) } else { i + 1 };
            }
            let is_block = tokens.get(i).is_some_and(|token| token.is("{"));
            i = if is_block { group_end(tokens, i) } else { i + 1 };
        } else {
            kept.push(tokens[i].clone());
            i += 1;
        }
    }
    kept
}

fn without_attributes(tokens: &[Token]) -> Vec<Token> {
    let mut kept = Vec::new();
    let mut i = 0;
    while i < tokens.len() {
        let bracket = if tokens.get(i + 1).is_some_and(|token| token.is("!")) { i + 2 } else { i + 1 };
        if tokens[i].is("#") && tokens.get(bracket).is_some_and(|token| token.is("[")) {
            i = group_end(tokens, bracket);
        } else {
            kept.push(tokens[i].clone());
            i += 1;
        }
    }
    kept
}
