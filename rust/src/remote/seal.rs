//! Objects that only those who have a tenant's key can read (docs/format.md, "A sealed bucket"): AES-256-GCM in frames,
//! with keys by HKDF.

use std::ops::Range;

use data_encoding::{BASE64, HEXLOWER, HEXLOWER_PERMISSIVE};
use ring::aead::{Aad, LessSafeKey, Nonce, UnboundKey, AES_256_GCM, NONCE_LEN};
use ring::rand::{SecureRandom, SystemRandom};
use ring::{digest, hkdf};

use super::failure::{Failure, Result, DAMAGED, INCOMPATIBLE};
use super::names::Names;

const MAGIC: &[u8; 8] = b"torpseal";
const VERSION: u64 = 1;
const HEADER: usize = 80;
const ID: usize = 16;
const TAG: usize = 16;
/// The first frame is short: what is asked of most objects, their checksum, costs few bytes.
const FIRST: u64 = 256;
const FRAME: u64 = 1 << 20;
/// Header and first frame, where it is whole.
pub const BEGINNING: u64 = (HEADER + TAG) as u64 + FIRST;

struct Length(usize);

impl hkdf::KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

/// HKDF-SHA256. At most 255 x 32 bytes.
fn derive<const N: usize>(secret: &[u8], salt: &[u8], info: &[&[u8]]) -> [u8; N] {
    let mut out = [0; N];
    let made = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(secret);
    made.expand(info, Length(N)).and_then(|made| made.fill(&mut out)).expect("HKDF makes so many bytes");
    out
}

struct Key {
    secret: Vec<u8>,
    id: [u8; ID],
}

impl Key {
    /// `text`: 64 hex digits, or base64 of 32 bytes. It is repeated in no error.
    fn parse(text: &str) -> Result<Self> {
        let text = text.trim();
        let encoding = if text.len() == 64 { HEXLOWER_PERMISSIVE } else { BASE64 };
        let secret = encoding.decode(text.as_bytes()).ok().filter(|secret| secret.len() == 32);
        let secret = secret.ok_or_else(|| Failure::invalid("a key is 64 hex digits, or 32 bytes in base64"))?;
        let id = derive(&secret, &[], &[b"torpor key id"]);
        Ok(Self { secret, id })
    }
}

/// 32 hex digits that tell which key it is, and nothing else of it.
pub fn key_id(text: &str) -> Result<String> {
    Ok(HEXLOWER.encode(&Key::parse(text)?.id))
}

pub struct Keys {
    keys: Vec<Key>, // what is sealed from now on is sealed with the first
    names: Names,
}

impl Keys {
    /// `names`: the id of the key that names are made with.
    pub fn new(texts: &[&str], names: &str) -> Result<Self> {
        let keys = texts.iter().map(|text| Key::parse(text)).collect::<Result<Vec<_>>>()?;
        let of_names = keys.iter().find(|key| HEXLOWER.encode(&key.id) == names);
        let of_names = of_names.ok_or_else(|| Failure::invalid("there is no key for names"))?;
        let made: [u8; 64] = derive(&of_names.secret, &[], &[b"torpor names"]);
        Ok(Self { names: Names::new(&made), keys })
    }

    pub fn names(&self) -> &Names {
        &self.names
    }

    /// Of one object: `header` has all but its check.
    fn cipher(key: &Key, header: &[u8], name: &str) -> LessSafeKey {
        let info: [&[u8]; 4] = [b"torpor object\0", &header[..32], &header[64..72], name.as_bytes()];
        let derived: [u8; 32] = derive(&key.secret, &header[32..64], &info);
        LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &derived).expect("AES-256 has keys of 32 bytes"))
    }

    /// `name`: its key in the bucket, as all above this file know it.
    pub fn seal(&self, name: &str, data: &[u8]) -> Result<Vec<u8>> {
        let (key, length) = (&self.keys[0], data.len() as u64);
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(MAGIC);
        header[8..16].copy_from_slice(&VERSION.to_le_bytes());
        header[16..32].copy_from_slice(&key.id);
        SystemRandom::new()
            .fill(&mut header[32..64])
            .map_err(|_| Failure::invalid("the system has no random bytes"))?;
        header[64..72].copy_from_slice(&length.to_le_bytes());
        let check = check_of(&header);
        header[72..].copy_from_slice(&check);
        let cipher = Self::cipher(key, &header, name);
        let mut sealed = Vec::with_capacity(stored(length) as usize);
        sealed.extend_from_slice(&header);
        for frame in 0..frames(length) {
            let (begin, end) = (frame_at(frame), frame_at(frame + 1).min(length));
            let at = sealed.len();
            sealed.extend_from_slice(&data[begin as usize..end as usize]);
            let tag = cipher.seal_in_place_separate_tag(nonce(frame), Aad::empty(), &mut sealed[at..]);
            sealed.extend_from_slice(tag.expect("a frame is shorter than AES-GCM allows").as_ref());
        }
        Ok(sealed)
    }

    /// `bytes`: the whole object.
    pub fn open(&self, name: &str, mut bytes: Vec<u8>) -> Result<Vec<u8>> {
        let object = self.begin(name, &bytes)?;
        if stored(object.length) != bytes.len() as u64 {
            return Err(damaged("it has another length than it had when it was sealed"));
        }
        object.open(0, HEADER, &mut bytes)?;
        Ok(bytes)
    }

    /// `beginning`: its first bytes, the whole header among them.
    pub fn begin(&self, name: &str, beginning: &[u8]) -> Result<Object> {
        let Some(header) = beginning.get(..HEADER) else { return Err(damaged("it is shorter than any sealed object")) };
        if &header[..8] != MAGIC || header[72..] != check_of(header) {
            return Err(damaged("it does not begin as a sealed object"));
        }
        let number = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("8 bytes"));
        if number(8) != VERSION {
            let sentence = format!("it is sealed in version {}, and this Torpor knows {VERSION}", number(8));
            return Err(Failure { status: INCOMPATIBLE, sentence });
        }
        let Some(key) = self.keys.iter().find(|key| key.id == header[16..32]) else {
            let sentence = format!(
                "it is sealed with the key {}, which the key command does not print; let it print that one, too",
                HEXLOWER.encode(&header[16..32])
            );
            return Err(Failure { status: INCOMPATIBLE, sentence });
        };
        Ok(Object { cipher: Self::cipher(key, header, name), length: number(64) })
    }
}

fn check_of(header: &[u8]) -> [u8; 8] {
    digest::digest(&digest::SHA256, &header[..72]).as_ref()[..8].try_into().expect("SHA-256 has 32 bytes")
}

pub fn damaged(how: &str) -> Failure {
    let sentence = format!("{how}; it is damaged, or somebody without the key has written it");
    Failure { status: DAMAGED, sentence }
}

fn nonce(frame: u64) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[..8].copy_from_slice(&frame.to_le_bytes());
    Nonce::assume_unique_for_key(bytes) // the key is of this object alone
}

fn frames(length: u64) -> u64 {
    1 + length.saturating_sub(FIRST).div_ceil(FRAME)
}

/// Where a frame's plaintext begins.
fn frame_at(frame: u64) -> u64 {
    frame.checked_sub(1).map_or(0, |behind| FIRST.saturating_add(behind.saturating_mul(FRAME)))
}

fn frame_of(offset: u64) -> u64 {
    offset.checked_sub(FIRST).map_or(0, |behind| 1 + behind / FRAME)
}

/// Bytes of the object that seals `length` bytes.
pub fn stored(length: u64) -> u64 {
    length.saturating_add(frames(length) * TAG as u64 + HEADER as u64)
}

/// What an object of `size` bytes seals; None: none has so many.
pub fn length_of(size: u64) -> Option<u64> {
    let tag = TAG as u64;
    let rest = size.checked_sub(HEADER as u64 + tag)?;
    if rest <= FIRST {
        return Some(rest);
    }
    let (whole, last) = ((rest - FIRST) / (FRAME + tag), (rest - FIRST) % (FRAME + tag));
    let last = if last == 0 { 0 } else { last.checked_sub(tag).filter(|&bytes| bytes > 0)? };
    Some(FIRST + whole * FRAME + last)
}

/// A sealed object whose header was read.
pub struct Object {
    cipher: LessSafeKey,
    length: u64,
}

impl Object {
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Where the frames lie that have the bytes from `begin` up to `end`, which are not past the length: the first
    /// one's number, where its plaintext begins, and their place in the object.
    pub fn place(&self, begin: u64, end: u64) -> (u64, u64, Range<u64>) {
        let (first, after) = (frame_of(begin), frame_of(end - 1) + 1);
        let at = |frame: u64| HEADER as u64 + frame_at(frame).min(self.length) + frame * TAG as u64;
        (first, frame_at(first), at(first)..at(after))
    }

    /// Opens the frames from `first` on that are in `bytes` from `from` on, whole, one after the other. Their plaintext
    /// is all of `bytes` then.
    pub fn open(&self, first: u64, from: usize, bytes: &mut Vec<u8>) -> Result<()> {
        let (mut read, mut written, mut frame) = (from, 0, first);
        while frame == first || read < bytes.len() {
            let size = frame_at(frame + 1).min(self.length).checked_sub(frame_at(frame));
            let end = size.and_then(|size| read.checked_add(size as usize)?.checked_add(TAG));
            let sealed = end.and_then(|end| bytes.get_mut(written..end));
            let sealed = sealed.ok_or_else(|| damaged("it ends before its frames do"))?;
            let opened = self.cipher.open_within(nonce(frame), Aad::empty(), sealed, read - written..);
            written += opened.map_err(|_| damaged(&format!("its frame {frame} is not the one that was sealed")))?.len();
            read = end.unwrap_or(read);
            frame += 1;
        }
        bytes.truncate(written);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
    const OTHER: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHiA=";

    fn keys(texts: &[&str]) -> Keys {
        Keys::new(texts, &key_id(texts[texts.len() - 1]).ok().unwrap()).ok().unwrap()
    }

    fn text(n: usize) -> Vec<u8> {
        (0..n).map(|i| (i * 7 % 251) as u8).collect()
    }

    fn status(opened: Result<Vec<u8>>) -> i32 {
        opened.map_or_else(|failure| failure.status, |_| 0)
    }

    #[test]
    fn what_is_sealed_is_opened_bit_for_bit_whatever_its_length() {
        let keys = keys(&[KEY]);
        let frame = FRAME as usize;
        for n in [0, 1, 255, 256, 257, 256 + frame - 1, 256 + frame, 257 + frame, 256 + 2 * frame] {
            let sealed = keys.seal("parts/x", &text(n)).ok().unwrap();
            assert_eq!(sealed.len() as u64, stored(n as u64));
            assert_eq!(length_of(sealed.len() as u64), Some(n as u64));
            assert!(keys.open("parts/x", sealed).ok().unwrap() == text(n), "{n}");
        }
        for size in [0, 79, 95, BEGINNING + 1, BEGINNING + 16] {
            assert_eq!(length_of(size), None, "{size}");
        }
    }

    #[test]
    fn any_flipped_bit_any_other_length_and_any_other_name_is_found() {
        let keys = keys(&[KEY]);
        let sealed = keys.seal("agents/ada/head", &text(700)).ok().unwrap();
        for byte in 0..sealed.len() {
            let mut flipped = sealed.clone();
            flipped[byte] ^= 1 << (byte % 8);
            assert_eq!(status(keys.open("agents/ada/head", flipped)), DAMAGED, "{byte}");
        }
        for size in 0..sealed.len() {
            assert_eq!(status(keys.open("agents/ada/head", sealed[..size].to_vec())), DAMAGED, "{size}");
        }
        let longer = [sealed.as_slice(), &[0]].concat();
        assert_eq!(status(keys.open("agents/ada/head", longer)), DAMAGED);
        assert_eq!(status(keys.open("agents/eve/head", sealed)), DAMAGED);
    }

    #[test]
    fn frames_can_neither_be_swapped_nor_left_out_nor_be_another_objects() {
        let keys = keys(&[KEY]);
        let (first, frame) = (BEGINNING as usize, FRAME as usize + TAG);
        let sealed = keys.seal("segments/x", &text(256 + 2 * FRAME as usize)).ok().unwrap();
        let again = keys.seal("segments/x", &text(256 + 2 * FRAME as usize)).ok().unwrap();
        assert!(sealed != again);
        let swapped = [&sealed[..first], &sealed[first + frame..], &sealed[first..first + frame]].concat();
        assert_eq!(status(keys.open("segments/x", swapped)), DAMAGED);
        assert_eq!(status(keys.open("segments/x", sealed[..first + frame].to_vec())), DAMAGED);
        let mixed = [&sealed[..first], &again[first..]].concat();
        assert_eq!(status(keys.open("segments/x", mixed)), DAMAGED);
        let mut shorter = sealed[..first + frame].to_vec(); // its header says so, too
        shorter[64..72].copy_from_slice(&(256 + FRAME).to_le_bytes());
        let check = check_of(&shorter);
        shorter[72..80].copy_from_slice(&check);
        assert_eq!(status(keys.open("segments/x", shorter)), DAMAGED);
    }

    #[test]
    fn a_range_is_opened_from_its_frames_alone() {
        let keys = keys(&[KEY]);
        let plain = text(256 + 2 * FRAME as usize + 5);
        let sealed = keys.seal("states/x", &plain).ok().unwrap();
        let end = plain.len() as u64;
        for (begin, end) in [(0, 1), (37, 69), (255, 257), (256, 257), (FRAME, FRAME + 400), (end - 1, end), (0, end)] {
            let object = keys.begin("states/x", &sealed[..HEADER]).ok().unwrap();
            let (first, at, place) = object.place(begin, end);
            let mut bytes = sealed[place.start as usize..place.end as usize].to_vec();
            object.open(first, 0, &mut bytes).ok().unwrap();
            assert!(bytes[(begin - at) as usize..(end - at) as usize] == plain[begin as usize..end as usize]);
        }
    }

    #[test]
    fn a_key_that_is_missing_is_no_damage() {
        let (old, both) = (keys(&[KEY]), keys(&[OTHER, KEY]));
        let sealed = old.seal("sweep", b"x").ok().unwrap();
        assert!(both.open("sweep", sealed.clone()).ok().unwrap() == b"x");
        let newer = both.seal("sweep", b"y").ok().unwrap();
        assert_eq!(status(old.open("sweep", newer.clone())), INCOMPATIBLE);
        assert!(newer[16..32] != sealed[16..32]);
        let mut later = sealed;
        later[8] = 2;
        let check = check_of(&later);
        later[72..80].copy_from_slice(&check);
        assert_eq!(status(old.open("sweep", later)), INCOMPATIBLE);
    }

    #[test]
    fn a_header_of_any_bytes_is_refused_and_nothing_is_allocated_by_its_word() {
        let keys = keys(&[KEY]);
        let sealed = keys.seal("sweep", &text(300)).ok().unwrap();
        for length in [0, 1, 299, 301, u64::MAX, u64::MAX - 300, 1 << 63, FRAME] {
            let mut header = sealed.clone();
            header[64..72].copy_from_slice(&length.to_le_bytes());
            let check = check_of(&header);
            header[72..80].copy_from_slice(&check);
            assert_eq!(status(keys.open("sweep", header.clone())), DAMAGED);
            let object = keys.begin("sweep", &header).ok().unwrap();
            for first in [0, 1, 2, 1 << 44, u64::MAX - 1] {
                let mut bytes = header.clone();
                assert!(object.open(first, HEADER, &mut bytes).is_err());
            }
        }
        let mut state = 1u64;
        for _ in 0..20_000 {
            let random = |state: &mut u64| {
                *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (*state >> 33) as usize
            };
            let mut mutated = sealed[..random(&mut state) % sealed.len()].to_vec();
            for _ in 0..1 + random(&mut state) % 4 {
                if let Some(byte) = random(&mut state).checked_rem(mutated.len()) {
                    mutated[byte] = random(&mut state) as u8;
                }
            }
            if mutated.len() >= HEADER {
                let check = check_of(&mutated);
                mutated[72..80].copy_from_slice(&check);
            }
            assert!(keys.open("sweep", mutated).is_err());
        }
    }

    #[test]
    fn a_key_is_32_bytes_in_hex_or_base64_and_its_id_tells_which() {
        assert!(key_id(KEY).ok() == key_id(&format!(" {}\n", KEY.to_uppercase())).ok());
        assert!(key_id("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=").ok() == key_id(KEY).ok());
        assert!(key_id(OTHER).ok() != key_id(KEY).ok());
        for text in ["", "secret", &KEY[1..], &KEY.replace('0', "g"), &format!("{KEY}00"), &OTHER[1..]] {
            let refused = key_id(text).err().unwrap();
            assert!(text.is_empty() || !refused.sentence.contains(text));
        }
    }
}
