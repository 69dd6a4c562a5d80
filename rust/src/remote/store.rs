//! One store: blocking calls over object_store's client.

use std::future::Future;
use std::ops::Range;
use std::sync::{Arc, Mutex, Weak};

use futures_util::stream::{BoxStream, StreamExt};
use object_store::path::Path;
use object_store::{
    Attribute, Attributes, GetOptions, GetRange, GetResult, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode,
    PutOptions, UpdateVersion,
};
use serde_json::{json, Map, Value};
use tokio::sync::watch;
use tokio::time::timeout;

use super::failure::{self, Failure, Result, CANCELLED, LARGE, NOT_FOUND, SHORT, UNKNOWN};
use super::seal::{self, Keys};
use super::settings::{client, Address, Kind, Options};
use crate::runtime::Runtime;

/// What the client's own time for a request is enough for; each MiB more is given an eighth of that.
const MIB: u64 = 1 << 20;
const PARTS: u32 = 8; // 2 Mbit/s at 30 s

pub enum Condition<'a> {
    Always,
    IfAbsent,
    IfTag(&'a str),
}

type Chunks = BoxStream<'static, object_store::Result<bytes::Bytes>>;

pub struct Store {
    client: Arc<dyn ObjectStore>, // before the runtime, which its connections need
    bulk: Arc<dyn ObjectStore>,   // for more than a MiB: its requests have no time of their own
    options: Options,
    prefix: Path,
    url: String,
    by_generation: bool,
    secrets: Vec<String>,
    keys: Option<Keys>, // that objects and their names are sealed with
    cancelled: watch::Sender<bool>,
    runtime: Arc<Runtime>,
}

/// The runtime of all stores; the last one that is closed ends it.
fn runtime() -> Result<Arc<Runtime>> {
    static SHARED: Mutex<Weak<Runtime>> = Mutex::new(Weak::new());
    let mut shared = SHARED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(runtime) = shared.upgrade().filter(|runtime| runtime.is_ours()) {
        return Ok(runtime);
    }
    let started = Runtime::start("torpor-remote");
    let started =
        Arc::new(started.map_err(|e| Failure::invalid(format!("can't start the thread of remote stores: {e}")))?);
    *shared = Arc::downgrade(&started);
    Ok(started)
}

impl Store {
    pub fn open(url: &str, options: &str) -> Result<Self> {
        let address = Address::parse(url)?;
        let (options, keys) = Options::parse(options)?;
        let runtime = runtime()?;
        let (client, bulk, secrets) = {
            let _entered = runtime.enter();
            let (small, secrets) = client(&address, &options)?;
            (small, client(&address, &options.of_bulk())?.0, secrets)
        };
        Ok(Self {
            client,
            bulk,
            options,
            prefix: address.prefix,
            url: url.trim_end_matches('/').into(),
            by_generation: address.kind == Kind::Google,
            secrets,
            keys,
            cancelled: watch::Sender::new(false),
            runtime,
        })
    }

    pub fn is_ours(&self) -> bool {
        self.runtime.is_ours()
    }

    pub fn cancel(&self) {
        self.cancelled.send_replace(true);
    }

    /// Waits for `request`, whose failure's sentence is its reason alone. `doing`: "write 'agents/ada/head'".
    fn wait<T>(&self, doing: &str, request: impl Future<Output = Result<T>>) -> Result<T> {
        if !self.is_ours() {
            return Err(Failure::invalid(
                "a remote store of the parent process can't be used in a forked one; open it again",
            ));
        }
        let mut cancelled = self.cancelled.subscribe();
        let done = self.runtime.block_on(async {
            tokio::select! {
                biased;
                _ = cancelled.wait_for(|&yes| yes) => {
                    Err(Failure { status: CANCELLED, sentence: "it was cancelled".into() })
                }
                done = request => done,
            }
        });
        done.map_err(|failure| Failure {
            status: failure.status,
            sentence: failure::hidden(&format!("can't {doing} in {}: {}", self.url, failure.sentence), &self.secrets),
        })
    }

    fn path(&self, key: &str) -> Result<Path> {
        let bad = || Failure::invalid(format!("'{key}' is no key of an object"));
        if key.is_empty() || key.starts_with('/') || key.ends_with('/') {
            return Err(bad());
        }
        self.below(&self.outside(key)).map_err(|_| bad())
    }

    fn outside(&self, key: &str) -> String {
        self.keys.as_ref().map_or_else(|| key.into(), |keys| keys.names().outside(key))
    }

    fn below(&self, key: &str) -> std::result::Result<Path, object_store::path::Error> {
        let prefix = self.prefix.as_ref();
        Path::parse(if prefix.is_empty() || key.is_empty() {
            format!("{prefix}{key}")
        } else {
            format!("{prefix}/{key}")
        })
    }

    fn tag(&self, e_tag: Option<String>, version: Option<String>) -> String {
        if self.by_generation { version.or(e_tag) } else { e_tag }.unwrap_or_default()
    }

    /// None: it is below the prefix, but not under a name that the keys have made.
    fn described(&self, object: &ObjectMeta) -> Option<Map<String, Value>> {
        let whole = object.location.as_ref();
        let key = whole.strip_prefix(self.prefix.as_ref()).map_or(whole, |key| key.trim_start_matches('/'));
        let tag = self.tag(object.e_tag.clone(), object.version.clone());
        let (key, size) = match &self.keys {
            Some(keys) => (keys.names().inside(key)?, seal::length_of(object.size).unwrap_or(object.size)),
            None => (key.into(), object.size),
        };
        let Value::Object(map) = json!({"key": key, "bytes": size, "tag": tag,
                                        "modified_ms": object.last_modified.timestamp_millis()})
        else {
            unreachable!()
        };
        Some(map)
    }

    pub fn put(&self, key: &str, data: &[u8], condition: Condition, metadata: &[(&str, &str)]) -> Result<String> {
        let path = self.path(key)?;
        let conditional = !matches!(condition, Condition::Always);
        let mode = match condition {
            Condition::Always => PutMode::Overwrite,
            Condition::IfAbsent => PutMode::Create,
            Condition::IfTag("") => return Err(Failure::invalid("an empty tag names no version of an object")),
            Condition::IfTag(tag) => {
                PutMode::Update(UpdateVersion { e_tag: Some(tag.into()), version: Some(tag.into()) })
            }
        };
        let mut attributes = Attributes::new();
        for (name, value) in metadata {
            attributes.insert(Attribute::Metadata(name.to_string().into()), value.to_string().into());
        }
        let payload = match &self.keys {
            Some(keys) => bytes::Bytes::from(keys.seal(key, data)?),
            None => bytes::Bytes::copy_from_slice(data),
        };
        let size = payload.len() as u64;
        let payload = payload.into();
        let options = PutOptions { mode, attributes, ..PutOptions::default() };
        self.wait(&format!("write '{key}'"), async {
            match self.within(size, self.client_for(size).put_opts(&path, payload, options)).await? {
                Ok(put) => Ok(self.tag(put.e_tag, put.version)),
                Err(e) => Err(failure::of_put(&e, conditional, &self.secrets)),
            }
        })
    }

    fn client_for(&self, size: u64) -> &Arc<dyn ObjectStore> {
        if size > MIB {
            &self.bulk
        } else {
            &self.client
        }
    }

    /// Waits for a request that moves `size` bytes, as long as these may take. The client knows how long a small one
    /// may.
    async fn within<T>(&self, size: u64, request: impl Future<Output = T>) -> Result<T> {
        if size <= MIB {
            return Ok(request.await);
        }
        let options = &self.options;
        let more = options.request_timeout / PARTS * (size / MIB) as u32;
        let allowed = options.request_timeout + more + options.retry_timeout;
        timeout(allowed, request).await.map_err(|_| late())
    }

    /// `size`: how many bytes come, at most. They come one chunk after the other, each in the time of a request.
    async fn ask(&self, path: &Path, options: GetOptions, size: u64) -> Result<GetResult> {
        let asked = self.within(size.min(MIB + 1), self.client_for(size).get_opts(path, options)).await?;
        asked.map_err(|e| failure::of(&e, &self.secrets))
    }

    async fn next(&self, stream: &mut Chunks) -> Result<Option<bytes::Bytes>> {
        let next = timeout(self.options.request_timeout, stream.next()).await.map_err(|_| late())?;
        next.transpose().map_err(|e| failure::of(&e, &self.secrets))
    }

    pub fn get(&self, key: &str, most: u64) -> Result<(Vec<u8>, String)> {
        let path = self.path(key)?;
        let most = if self.keys.is_some() { seal::stored(most) } else { most };
        self.wait(&format!("read '{key}'"), async {
            let result = self.ask(&path, GetOptions::default(), most).await?;
            let mut about = self.described(&result.meta).unwrap_or_default();
            let mut metadata = Map::new();
            for (name, value) in &result.attributes {
                if let Attribute::Metadata(name) = name {
                    metadata.insert(name.to_string(), value.as_ref().into());
                }
            }
            about.insert("metadata".into(), metadata.into());
            let size = result.meta.size;
            if size > most {
                let sentence = format!("it has {size} bytes, and may have {most}");
                return Err(Failure { status: LARGE, sentence });
            }
            let mut bytes = self.bytes_of(result, size).await?;
            if let Some(keys) = &self.keys {
                bytes = keys.open(key, bytes)?;
            }
            Ok((bytes, Value::Object(about).to_string()))
        })
    }

    async fn bytes_of(&self, result: GetResult, size: u64) -> Result<Vec<u8>> {
        let mut stream = result.into_stream();
        let mut bytes = Vec::new(); // grows as bytes arrive
        while let Some(chunk) = self.next(&mut stream).await? {
            if (bytes.len() + chunk.len()) as u64 > size {
                return Err(unfinished());
            }
            bytes.extend_from_slice(&chunk);
        }
        if bytes.len() as u64 == size {
            Ok(bytes)
        } else {
            Err(unfinished())
        }
    }

    pub fn head(&self, key: &str) -> Result<String> {
        let path = self.path(key)?;
        self.wait(&format!("look for '{key}'"), async {
            let object = self.client.head(&path).await.map_err(|e| failure::of(&e, &self.secrets))?;
            Ok(Value::Object(self.described(&object).unwrap_or_default()).to_string())
        })
    }

    pub fn read(&self, key: &str, offset: u64, out: &mut [u8]) -> Result<()> {
        let path = self.path(key)?;
        let Some(end) = offset.checked_add(out.len() as u64) else {
            return Err(Failure::invalid(format!("'{key}' has no bytes so far behind its beginning")));
        };
        self.wait(&format!("read '{key}'"), async {
            if let Some(keys) = &self.keys {
                return self.read_sealed(keys, key, &path, offset..end, out).await;
            }
            let result = self.ask_range(&path, offset..end).await?;
            if result.range != (offset..end) {
                return Err(short(result.meta.size, end));
            }
            let mut filled = 0;
            let mut stream = result.into_stream();
            while let Some(chunk) = self.next(&mut stream).await? {
                let Some(room) = out.get_mut(filled..filled + chunk.len()) else { return Err(unfinished()) };
                room.copy_from_slice(&chunk);
                filled += chunk.len();
            }
            if filled == out.len() {
                Ok(())
            } else {
                Err(unfinished())
            }
        })
    }

    async fn ask_range(&self, path: &Path, range: Range<u64>) -> Result<GetResult> {
        let size = range.end - range.start;
        self.ask(path, GetOptions { range: Some(GetRange::Bounded(range)), ..GetOptions::default() }, size).await
    }

    /// What is in the first frame comes with the header, in one request; the rest in a second one.
    async fn read_sealed(&self, keys: &Keys, key: &str, path: &Path, wanted: Range<u64>, out: &mut [u8]) -> Result<()> {
        let result = self.ask_range(path, 0..seal::BEGINNING).await?;
        let (size, beginning) = (result.meta.size, result.range.end);
        let mut bytes = self.bytes_of(result, beginning).await?;
        let object = keys.begin(key, &bytes)?;
        if seal::length_of(size) != Some(object.length()) {
            return Err(seal::damaged("it has another length than it had when it was sealed"));
        }
        if wanted.end > object.length() {
            return Err(short(object.length(), wanted.end));
        }
        let (first, at, place) = object.place(wanted.start, wanted.end);
        let mut from = place.start as usize;
        if place.end > beginning {
            let result = self.ask_range(path, place.clone()).await?;
            if result.range != place {
                return Err(short(result.meta.size, place.end));
            }
            bytes = self.bytes_of(result, place.end - place.start).await?;
            from = 0;
        }
        object.open(first, from, &mut bytes)?;
        out.copy_from_slice(&bytes[(wanted.start - at) as usize..(wanted.end - at) as usize]);
        Ok(())
    }

    pub fn list(&self, directory: &str) -> Result<String> {
        let bad = |_| Failure::invalid(format!("'{directory}' is no directory of objects"));
        let path = self.below(&self.outside(directory)).map_err(bad)?;
        self.wait(&format!("list '{directory}'"), async {
            let mut objects = Vec::new();
            let mut stream = self.client.list(Some(&path));
            while let Some(object) = stream.next().await {
                let object = object.map_err(|e| failure::of(&e, &self.secrets))?;
                objects.extend(self.described(&object).map(Value::Object));
            }
            Ok(Value::Array(objects).to_string())
        })
    }

    pub fn remove(&self, key: &str) -> Result<()> {
        let path = self.path(key)?;
        self.wait(&format!("remove '{key}'"), async {
            match self.client.delete(&path).await.map_err(|e| failure::of_removal(&e, &self.secrets)) {
                Err(gone) if gone.status == NOT_FOUND => Ok(()),
                done => done,
            }
        })
    }
}

fn short(size: u64, end: u64) -> Failure {
    Failure { status: SHORT, sentence: format!("it has {size} bytes, and was to have {end}") }
}

fn late() -> Failure {
    Failure { status: UNKNOWN, sentence: "no answer came in time; check the network, or try again later".into() }
}

fn unfinished() -> Failure {
    Failure { status: UNKNOWN, sentence: "the store sent another number of bytes than it had said; try again".into() }
}
