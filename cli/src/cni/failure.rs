//! What the plugin answers when it cannot (CNI 1.1, "Error").

use std::fmt;

use serde_json::{Value, json};

/// Codes that the specification has, and ours from 100 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// A version that is not known.
    Version = 1,
    /// Wrong or missing variables.
    Environment = 4,
    /// Files and folders.
    Io = 5,
    /// The configuration is no such JSON.
    Decode = 6,
    /// The configuration cannot be.
    Config = 7,
    /// The switch cannot be reached.
    Unavailable = 50,
    /// The switch refused.
    Switch = 100,
    /// CHECK found something amiss.
    Check = 101,
    /// The plugin that gives addresses failed.
    Ipam = 102,
}

/// An error with its code.
#[derive(Debug)]
pub struct Failure {
    pub code: Code,
    text: String,
}

/// The longest text, in characters: a runtime may give anything, which is quoted, and may not read what a pipe cannot hold.
const MOST: usize = 2000;

/// An error with its code.
pub fn fail(code: Code, text: impl Into<String>) -> Failure {
    let mut text = text.into();
    if let Some((end, _)) = text.char_indices().nth(MOST) {
        text.truncate(end);
        text += "...";
    }
    Failure { code, text }
}

impl Failure {
    /// As the runtime wants to have it.
    pub fn json(&self, version: &str) -> Value {
        json!({ "cniVersion": version, "code": self.code as u32, "msg": self.text, "details": "" })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Gives errors of any kind a code.
pub trait OrFail<T> {
    fn or_fail(self, code: Code) -> Result<T, Failure>;
}

impl<T> OrFail<T> for anyhow::Result<T> {
    fn or_fail(self, code: Code) -> Result<T, Failure> {
        self.map_err(|e| fail(code, crate::common::describe(&e)))
    }
}
