//! The cache of huggingface_hub: `blobs/DIGEST`, `snapshots/COMMIT/FILE` that links to one, `refs/REVISION`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha1::Sha1;
use sha2::{Digest as _, Sha256};

use super::client::Client;
use super::listing::{Digest, RemoteFile};
use super::{fail, Result, CORRUPT, FAILED};
use crate::abi::Failure;

/// Tries of one file in a row that bring nothing.
const TRIES: u32 = 5;

pub struct Repository {
    directory: PathBuf,
    locks: PathBuf,
}

fn trouble(doing: &str, path: &Path, error: io::Error) -> Failure {
    Failure { status: FAILED, sentence: format!("can't {doing} '{}': {error}", path.display()) }
}

fn make_directory(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|e| trouble("make", path, e))
}

impl Repository {
    pub fn open(cache: &str, repo: &str) -> Result<Self> {
        let name = format!("models--{}", repo.replace('/', "--"));
        let repository =
            Self { directory: Path::new(cache).join(&name), locks: Path::new(cache).join(".locks").join(&name) };
        make_directory(&repository.directory.join("blobs"))?;
        make_directory(&repository.locks)?;
        Ok(repository)
    }

    fn blob(&self, file: &RemoteFile) -> PathBuf {
        self.directory.join("blobs").join(&file.hex)
    }

    fn incomplete(&self, file: &RemoteFile) -> PathBuf {
        self.directory.join("blobs").join(format!("{}.incomplete", file.hex))
    }

    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.directory.join("snapshots").join(commit)
    }

    /// Bytes of a file that are there already.
    pub fn held(&self, file: &RemoteFile) -> u64 {
        let size = |path: PathBuf| fs::metadata(path).map(|found| found.len());
        size(self.blob(file)).or_else(|_| size(self.incomplete(file))).unwrap_or(0).min(file.size)
    }

    pub fn require_room(&self, bytes: u64) -> Result<()> {
        let Ok(path) = std::ffi::CString::new(self.directory.as_os_str().as_bytes()) else { return Ok(()) };
        let free = unsafe {
            let mut found: libc::statvfs = std::mem::zeroed();
            if libc::statvfs(path.as_ptr(), &mut found) != 0 {
                return Ok(()); // a write will tell
            }
            (found.f_bavail as u64).saturating_mul(found.f_frsize as u64)
        };
        if free < bytes {
            let (more, free, place) = (bytes / 1_000_000, free / 1_000_000, self.directory.display());
            return fail(
                FAILED,
                format!("{more} MB are to come, and {free} MB are free for '{place}'; free some space"),
            );
        }
        Ok(())
    }

    /// Held until the file is dropped, against huggingface_hub too, which locks so.
    fn lock(&self, file: &RemoteFile) -> Result<File> {
        let path = self.locks.join(format!("{}.lock", file.hex));
        let lock = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
        let lock = lock.map_err(|e| trouble("open", &path, e))?;
        while unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) } != 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(trouble("lock", &path, error));
            }
        }
        Ok(lock)
    }

    /// Sees to it that the blob is there, whole and checked; gives the bytes that came. `progress` gets those there.
    pub async fn fetch(
        &self,
        client: &Client,
        commit: &str,
        file: &RemoteFile,
        mut progress: impl FnMut(u64),
    ) -> Result<u64> {
        let blob = self.blob(file);
        let is_there = || fs::metadata(&blob).is_ok_and(|found| found.len() == file.size);
        if is_there() {
            return Ok(0);
        }
        let _lock = self.lock(file)?;
        if is_there() {
            return Ok(0); // another process fetched it meanwhile
        }
        let mut part = Part::open(self.incomplete(file), file)?;
        let mut came = 0;
        let mut tries = 0;
        while part.size < file.size || (file.size == 0 && tries == 0) {
            let before = part.size;
            let result = part.receive(client, commit, file, &mut progress, &mut came).await;
            if part.size > before {
                tries = 0;
            }
            match result {
                Err(failure) if failure.status == FAILED && !part.broken && tries + 1 < TRIES => {}
                Err(failure) => return Err(failure),
                Ok(()) if part.size == file.size => break,
                Ok(()) if tries + 1 < TRIES => {} // it ended early
                Ok(()) => return fail(FAILED, format!("'{}' ends before its end; try again", file.name)),
            }
            tokio::time::sleep(Duration::from_millis(250 << tries)).await;
            tries += 1;
        }
        part.finish(file, &blob)?;
        Ok(came)
    }

    pub fn link(&self, commit: &str, file: &RemoteFile) -> Result<()> {
        let path = self.snapshot(commit).join(&file.name);
        make_directory(path.parent().unwrap_or(&path))?;
        let depth = file.name.matches('/').count() + 2;
        let target = Path::new(&"../".repeat(depth)).join("blobs").join(&file.hex);
        if fs::read_link(&path).is_ok_and(|found| found == target) {
            return Ok(());
        }
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(trouble("replace", &path, e)),
            _ => {}
        }
        symlink(target, &path).map_err(|e| trouble("make", &path, e))
    }

    /// Names the snapshot, which is whole now. A commit needs no name.
    pub fn set_ref(&self, revision: &str, commit: &str) -> Result<()> {
        if revision == commit {
            return Ok(());
        }
        let path = self.directory.join("refs").join(revision);
        make_directory(path.parent().unwrap_or(&path))?;
        let written = path.with_file_name(format!(".torpor-{}", std::process::id()));
        let put = fs::write(&written, commit).and_then(|()| fs::rename(&written, &path));
        put.map_err(|e| trouble("write", &path, e))
    }
}

/// Bytes of a file on their way, and their digest so far.
struct Part {
    path: PathBuf,
    out: File,
    size: u64,
    hash: Hash,
    broken: bool, // a write failed, which may have left bytes behind `size`: the next process counts them
}

enum Hash {
    Git(Sha1),
    Sha256(Sha256),
}

impl Hash {
    fn of(file: &RemoteFile) -> Self {
        match file.digest {
            Digest::Sha256 => Self::Sha256(Sha256::new()),
            Digest::Git => Self::Git(Sha1::new_with_prefix(format!("blob {}\0", file.size))),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Git(hash) => hash.update(bytes),
            Self::Sha256(hash) => hash.update(bytes),
        }
    }

    fn hex(self) -> String {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        match self {
            Self::Git(hash) => hex(&hash.finalize()),
            Self::Sha256(hash) => hex(&hash.finalize()),
        }
    }
}

impl Part {
    /// Goes on with what an earlier process left.
    fn open(path: PathBuf, file: &RemoteFile) -> Result<Self> {
        let opened = OpenOptions::new().read(true).append(true).create(true).open(&path);
        let mut out = opened.map_err(|e| trouble("open", &path, e))?;
        let mut hash = Hash::of(file);
        let mut size = 0;
        let mut buffer = vec![0; 1 << 20];
        loop {
            match out.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => {
                    hash.update(&buffer[..n]);
                    size += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(trouble("read", &path, e)),
            }
        }
        let mut part = Self { path, out, size, hash, broken: false };
        if size > file.size {
            part.start_again(file)?;
        }
        Ok(part)
    }

    fn start_again(&mut self, file: &RemoteFile) -> Result<()> {
        self.out.set_len(0).map_err(|e| trouble("empty", &self.path, e))?;
        self.size = 0;
        self.hash = Hash::of(file);
        Ok(())
    }

    /// One request's bytes.
    async fn receive(
        &mut self,
        client: &Client,
        commit: &str,
        file: &RemoteFile,
        progress: &mut impl FnMut(u64),
        came: &mut u64,
    ) -> Result<()> {
        let (mut response, from) = client.open(commit, file, self.size).await?;
        if from != self.size {
            self.start_again(file)?;
        }
        while let Some(bytes) = client.chunk(&mut response).await? {
            let bytes = bytes.as_ref();
            if bytes.len() as u64 > file.size - self.size {
                drop(fs::remove_file(&self.path));
                return fail(
                    CORRUPT,
                    format!("more bytes came of '{}' than the hub says it has; try again", file.name),
                );
            }
            if let Err(error) = self.out.write_all(bytes) {
                self.broken = true;
                return Err(trouble("write", &self.path, error));
            }
            self.hash.update(bytes);
            self.size += bytes.len() as u64;
            *came += bytes.len() as u64;
            progress(self.size);
        }
        Ok(())
    }

    /// Puts it in place if it is what the hub says.
    fn finish(self, file: &RemoteFile, blob: &Path) -> Result<()> {
        if self.hash.hex() != file.hex {
            drop(fs::remove_file(&self.path));
            return fail(CORRUPT, format!("what came of '{}' is not what the hub says it is; try again", file.name));
        }
        self.out.sync_all().map_err(|e| trouble("flush", &self.path, e))?;
        fs::rename(&self.path, blob).map_err(|e| trouble("put in place", blob, e))
    }
}
