//! The file: where it is, how it is changed, and what is said about one that cannot be used.

use std::{
    env,
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use tracing::info;

use super::{LedgerEntry, LedgerState, fault::point};
use crate::{enforce::clear_groups, sys};

const NAME: &str = "sched-ledger.json";

/// How long somebody else may hold the lock: a change takes well under a millisecond.
const PATIENCE: Duration = Duration::from_secs(5);

/// The ledger of this host, or of this user.
#[derive(Clone, Debug)]
pub struct Ledger {
    path: PathBuf,
    scope: Scope,
}

/// Whose VMs a ledger knows of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Everybody's.
    Host,
    /// One user's: nothing is known of what others run.
    User,
    /// Those that were told to use this file.
    Chosen,
}

/// Why the ledger cannot be used. Nothing has been changed.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// A newer program wrote it.
    #[error(
        "{path} has version {version} of the ledger's format, and this program knows {known}: a newer Rota runs VMs here. \
         Use that one, or, when its VMs have ended, `rm {path}`"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// What it says.
        version: u64,
        /// What is known here.
        known: u32,
    },
    /// It is no ledger, or only the beginning of one.
    #[error(
        "{path} is no ledger ({why}). Rota replaces this file as a whole, so something else wrote to it. \
         When no VM of Rota runs here, `rm {path}`; while some run, restart them afterwards"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Somebody holds the lock and does not let go.
    #[error(
        "{path} has been locked for {} s: a process that uses it is stopped (`fuser {path}` names it; continue or kill it)",
        PATIENCE.as_secs()
    )]
    Locked {
        /// The lock.
        path: PathBuf,
    },
    /// There is no directory for it.
    #[error(
        "no place for the ledger: /run/rota is root's and XDG_RUNTIME_DIR is not set. Set XDG_RUNTIME_DIR, or name a file: \
         --ledger FILE"
    )]
    NoPlace,
    /// The directory for it cannot be made.
    #[error(
        "the ledger belongs in {path}, which cannot be created: make it writable, or name another file (--ledger FILE)"
    )]
    NoDirectory {
        /// The directory.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The host refuses something.
    #[error("cannot {what} {path}")]
    Io {
        /// What was to be done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

impl Ledger {
    /// The host's ledger for root (`/run/rota`), the user's for others (`$XDG_RUNTIME_DIR/rota`), or the file `path`.
    ///
    /// # Errors
    /// No place for it.
    pub fn open(path: Option<&Path>) -> Result<Self, LedgerError> {
        let ledger = Self::find(path)?;
        let directory = ledger.directory();
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(directory)
            .map_err(|source| LedgerError::NoDirectory {
                path: directory.to_owned(),
                source,
            })?;
        Ok(ledger)
    }

    /// Removes what VMs whose process is gone have left: for those that start without a claim. Where there is no ledger, none is made.
    ///
    /// # Errors
    /// No place for one, or it cannot be used.
    pub fn clear_away(path: Option<&Path>) -> Result<(), LedgerError> {
        let ledger = Self::find(path)?;
        if ledger.load()?.entries.iter().all(|it| it.owner.is_alive()) {
            return Ok(());
        }
        ledger.update(|_| Ok(()))
    }

    fn find(path: Option<&Path>) -> Result<Self, LedgerError> {
        let (path, scope) = match path {
            Some(path) => (path.to_owned(), Scope::Chosen),
            None if sys::is_root() => (Path::new("/run/rota").join(NAME), Scope::Host),
            None => {
                let runtime = env::var_os("XDG_RUNTIME_DIR")
                    .map(PathBuf::from)
                    .or_else(|| Some(PathBuf::from(format!("/run/user/{}", sys::uid()))))
                    .filter(|directory| directory.is_dir())
                    .ok_or(LedgerError::NoPlace)?;
                (runtime.join("rota").join(NAME), Scope::User)
            }
        };
        Ok(Self { path, scope })
    }

    /// The ledger in the file `path`, to look into: where there is none, none is made.
    #[must_use]
    pub fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            scope: Scope::Chosen,
        }
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory it is in: a change is a file renamed into it.
    pub(crate) fn directory(&self) -> &Path {
        directory_of(&self.path)
    }

    /// Whose VMs it knows of.
    #[must_use]
    pub fn scope(&self) -> Scope {
        self.scope
    }

    /// What is in it now, without what belongs to processes that are gone. Takes no lock.
    ///
    /// # Errors
    /// It is damaged or newer, or cannot be read.
    pub fn read(&self) -> Result<LedgerState, LedgerError> {
        let mut state = self.load()?;
        state.reap();
        Ok(state)
    }

    /// What was in it when it was written: who is gone can be told of this host's processes only, and this may be a ledger of
    /// another's.
    ///
    /// # Errors
    /// It is damaged or newer, or cannot be read.
    pub fn recorded(&self) -> Result<LedgerState, LedgerError> {
        self.load()
    }

    /// Changes it: `change` sees what is in it, without what belongs to processes that are gone, and what it leaves is written,
    /// unless it fails. The control groups of those that are gone are removed first.
    ///
    /// # Errors
    /// It is damaged, newer, locked, or cannot be written; or what `change` fails with.
    pub fn update<T, E: From<LedgerError>>(
        &self,
        change: impl FnOnce(&mut LedgerState) -> Result<T, E>,
    ) -> Result<T, E> {
        let _lock = self.lock()?;
        point();
        let before = self.load()?;
        let mut state = before.clone();
        for gone in state.reap() {
            for group in clear_groups(&gone.owner, &gone.groups) {
                info!(
                    "control group {} of {}, whose process {} is gone: removed",
                    group.display(),
                    gone.plan.request.vm,
                    gone.owner.pid
                );
            }
        }
        point();
        let result = change(&mut state)?;
        if state != before {
            self.store(&state)?;
        }
        Ok(result)
    }

    fn load(&self) -> Result<LedgerState, LedgerError> {
        let text = match fs::read_to_string(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(LedgerState {
                    version: LedgerState::VERSION,
                    ..LedgerState::default()
                });
            }
            Err(source) => return Err(io_error("read", &self.path)(source)),
        };
        self.parse(&text)
    }

    fn parse(&self, text: &str) -> Result<LedgerState, LedgerError> {
        /// The part that every version has.
        #[derive(serde::Deserialize)]
        struct Header {
            version: u64,
        }
        let damaged = |error: &serde_json::Error| LedgerError::Damaged {
            path: self.path.clone(),
            why: match error.classify() {
                serde_json::error::Category::Eof if text.trim().is_empty() => {
                    "it is empty".to_owned()
                }
                serde_json::error::Category::Eof => format!("it ends after {} bytes", text.len()),
                _ => error.to_string(),
            },
        };
        let header: Header = serde_json::from_str(text).map_err(|error| damaged(&error))?;
        if header.version > LedgerState::VERSION.into() {
            return Err(LedgerError::Newer {
                path: self.path.clone(),
                version: header.version,
                known: LedgerState::VERSION,
            });
        }
        serde_json::from_str(text).map_err(|error| damaged(&error))
    }

    /// The lock is a file of its own, since the ledger is another file after each change. Nobody but its owner may open it, or
    /// anybody could hold the lock.
    fn lock(&self) -> Result<File, LedgerError> {
        let path = self.path.with_extension("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(io_error("open", &path))?;
        point();
        let begun = Instant::now();
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(lock),
                Err(TryLockError::WouldBlock) if begun.elapsed() > PATIENCE => {
                    return Err(LedgerError::Locked { path });
                }
                Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_micros(500)),
                Err(TryLockError::Error(source)) => return Err(io_error("lock", &path)(source)),
            }
        }
    }

    /// Only while holding the lock. What a dead writer has left of the new file is written over.
    fn store(&self, state: &LedgerState) -> Result<(), LedgerError> {
        let new = self.path.with_extension("new");
        let mut text = serde_json::to_string_pretty(state).map_err(|error| LedgerError::Io {
            what: "put into words what belongs in",
            path: self.path.clone(),
            source: error.into(),
        })?;
        text.push('\n');
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o644)
            .open(&new)
            .map_err(io_error("create", &new))?;
        point();
        file.write_all(text.as_bytes())
            .map_err(io_error("write", &new))?;
        point();
        file.sync_all().map_err(io_error("write", &new))?;
        point();
        fs::rename(&new, &self.path).map_err(io_error("replace", &self.path))?;
        point();
        let directory = directory_of(&self.path);
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(io_error("write", directory))?;
        point();
        Ok(())
    }
}

impl LedgerState {
    /// Drops what belongs to processes that are gone, and returns it.
    fn reap(&mut self) -> Vec<LedgerEntry> {
        self.entries
            .extract_if(.., |entry| !entry.owner.is_alive())
            .collect()
    }
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory,
        _ => Path::new("."),
    }
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LedgerError {
    move |source| LedgerError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}
