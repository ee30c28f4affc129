//! What the documents say of the repository: tests and files that they name exist, figures agree.

use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// What stands between backquotes.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// `path/to/file.rs::name`.
fn tests(text: &str) -> Vec<(&str, &str)> {
    quoted(text)
        .filter_map(|word| word.split_once("::"))
        .filter(|(file, _)| file.ends_with(".rs"))
        .collect()
}

/// What is wrong with a page: tests that are not there, lines of the threat model that name none.
fn wrong(page: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    for (file, name) in tests(page) {
        let text = std::fs::read_to_string(root().join(file)).unwrap_or_default();
        if !text.contains(&format!("fn {name}(")) {
            wrong.push(format!("{file} has no test {name}"));
        }
    }
    // Other files of the repository, where the path is whole.
    let whole =
        |word: &&str| word.ends_with(".rs") && word.split_once('/').is_some_and(|(top, _)| root().join(top).is_dir());
    for file in quoted(page).filter(|word| !word.contains("::")).filter(whole) {
        if !root().join(file).is_file() {
            wrong.push(format!("there is no {file}"));
        }
    }
    let section = page
        .split("\n## ")
        .find(|part| part.starts_with("What the other side can do to us"));
    let lines = section
        .unwrap_or_default()
        .lines()
        .filter(|line| line.starts_with("| "));
    let lines: Vec<&str> = lines.filter(|line| !line.ends_with("| shown by |")).collect();
    if lines.len() < 10 {
        wrong.push("the threat model is not there".into());
    }
    let silent = lines.iter().filter(|line| tests(line).is_empty());
    wrong.extend(silent.map(|line| format!("no test is named: {line}")));
    wrong
}

#[test]
fn every_line_of_the_threat_model_names_tests_that_exist() {
    let page = read("docs/security.md");
    assert_eq!(wrong(&page), [""; 0]);
    // The check finds what it is for.
    let first = tests(&page)[0];
    let renamed = page.replacen(
        &format!("{}::{}", first.0, first.1),
        &format!("{}::no_such_test", first.0),
        1,
    );
    assert_eq!(wrong(&renamed).len(), 1);
    let gone = page.replacen(first.0, "no/such/file.rs", 1);
    assert_eq!(wrong(&gone).len(), 1);
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn the_table_of_unsafe_code_is_complete() {
    let page = read("docs/security.md");
    let table = page
        .split("\n## ")
        .find(|part| part.starts_with("Unsafe code"))
        .unwrap();
    let named: Vec<&str> = quoted(table).filter(|word| word.contains("src/")).collect();
    let crates = [
        "virtio-ring",
        "vhost-proto",
        "ixgbevf",
        "hugemem",
        "iova",
        "usernic",
        "ffi",
        "ffi/dpdk",
        "cli",
    ];
    let mut used = vec![false; named.len()];
    for folder in crates {
        let mut files = Vec::new();
        sources(&root().join(folder).join("src"), &mut files);
        assert!(!files.is_empty(), "{folder}");
        for file in files {
            let text = std::fs::read_to_string(&file).unwrap();
            if !["unsafe {", "unsafe fn", "unsafe impl"]
                .iter()
                .any(|word| text.contains(word))
            {
                continue;
            }
            let file = file.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
            let row = named.iter().position(|path| file.starts_with(path));
            used[row.unwrap_or_else(|| panic!("{file} has unsafe code and is not in docs/security.md"))] = true;
        }
    }
    let idle: Vec<_> = named.iter().zip(used).filter(|(_, used)| !used).collect();
    assert!(idle.is_empty(), "without unsafe code: {idle:?}");
}

#[test]
fn links_lead_to_files() {
    let pages = ["README.md", "CONTRIBUTING.md", "SECURITY.md"].map(str::to_owned);
    let docs = std::fs::read_dir(root().join("docs")).unwrap().flatten();
    let docs = docs.map(|entry| format!("docs/{}", entry.file_name().to_str().unwrap()));
    let mut seen = 0;
    for page in pages.into_iter().chain(docs.filter(|name| name.ends_with(".md"))) {
        let text = read(&page);
        let folder = root().join(&page).parent().unwrap().to_owned();
        for link in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split([')', '#']).next())
        {
            if link.is_empty() || link.contains("://") {
                continue;
            }
            assert!(folder.join(link).exists(), "{page}: {link}");
            seen += 1;
        }
    }
    assert!(seen > 30, "only {seen} links");
}

/// One figure, the one of the page that names its command.
#[test]
fn times_from_exec_to_the_first_packet_agree() {
    let page = read("docs/performance.md");
    let row = |metric: &str| -> Vec<String> {
        let line = page
            .lines()
            .find(|line| line.starts_with(&format!("| `{metric}`")))
            .expect(metric);
        line.split('|').map(|cell| cell.trim().to_owned()).collect()
    };
    let (outside, inside) = (row("startup.exec_to_first_packet"), row("startup.container"));
    let readme = read("README.md");
    let ours: f64 = outside[2].trim_end_matches(" ms").parse().unwrap();
    let theirs = outside[3].trim_end_matches(" ms");
    assert!(
        readme.contains(&format!("takes {ours:.1} ms in place of {theirs} ")),
        "{outside:?}"
    );
    assert!(
        readme.contains(&format!("| {ours:.1} ms | {theirs} ms, ")),
        "{outside:?}"
    );
    let containers = read("docs/containers.md");
    assert!(
        containers.contains(&format!("| {} | {} |", inside[2], inside[3])),
        "{inside:?}"
    );
}
