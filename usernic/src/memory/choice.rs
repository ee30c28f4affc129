//! What was taken, in words.

use std::borrow::Cow;
use std::fmt;
use std::path::PathBuf;

use hugemem::PageSize;

/// What a segment is made of, and why of nothing better.
///
/// Its `Display` is one line: `memfd-huge, 2 MiB pages` or `memfd, 4 KiB pages (0 huge pages of 2 MiB are free, 1
/// needed: ...)`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Choice {
    /// As in `memory=`, or a source's own word.
    pub kind: Cow<'static, str>,
    /// Its pages.
    pub page: PageSize,
    /// The mount that it is in.
    pub path: Option<PathBuf>,
    /// Why nothing better was taken, if there is something better.
    pub why: Option<String>,
}

impl Choice {
    /// A choice of this kind, of a source's own.
    pub fn new(kind: impl Into<Cow<'static, str>>, page: PageSize) -> Self {
        Choice {
            kind: kind.into(),
            page,
            path: None,
            why: None,
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind)?;
        if let Some(path) = &self.path {
            write!(f, " at {}", path.display())?;
        }
        write!(f, ", {} pages", self.page)?;
        if let Some(why) = &self.why {
            write!(f, " ({why})")?;
        }
        Ok(())
    }
}
