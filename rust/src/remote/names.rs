//! Names that tell nothing of what they name to who has not the key (docs/format.md, "A sealed bucket").

use data_encoding::BASE32_NOPAD;
use ring::hmac;

const POOLS: [&str; 3] = ["segments/", "states/", "parts/"];
const AGENTS: &str = "agents/";
const TAG: usize = 16;

/// RFC 4648's base32 in lower case, without padding.
fn to_digits(bytes: &[u8]) -> String {
    BASE32_NOPAD.encode(bytes).to_ascii_lowercase()
}

/// None: it is no text that `to_digits` makes.
fn from_digits(text: &str) -> Option<Vec<u8>> {
    let is_lower = !text.bytes().any(|digit| digit.is_ascii_uppercase());
    BASE32_NOPAD.decode(text.to_ascii_uppercase().as_bytes()).ok().filter(|_| is_lower)
}

pub struct Names {
    mac: hmac::Key,
    stream: hmac::Key,
}

impl Names {
    pub fn new(secret: &[u8; 64]) -> Self {
        let key = |half: &[u8]| hmac::Key::new(hmac::HMAC_SHA256, half);
        Self { mac: key(&secret[..32]), stream: key(&secret[32..]) }
    }

    fn tag_of(&self, kind: &str, name: &[u8]) -> [u8; TAG] {
        let mut context = hmac::Context::with_key(&self.mac);
        for part in [kind.as_bytes(), b"\0", name] {
            context.update(part);
        }
        context.sign().as_ref()[..TAG].try_into().expect("HMAC-SHA256 has 32 bytes")
    }

    fn mixed(&self, tag: &[u8], name: &[u8]) -> Vec<u8> {
        let mut mixed = name.to_vec();
        for (i, block) in mixed.chunks_mut(32).enumerate() {
            let mut context = hmac::Context::with_key(&self.stream);
            context.update(tag);
            context.update(&(i as u32).to_le_bytes());
            for (byte, key) in block.iter_mut().zip(context.sign().as_ref()) {
                *byte ^= key;
            }
        }
        mixed
    }

    /// An object's key as the bucket has it.
    pub fn outside(&self, key: &str) -> String {
        let Some((kind, name, rest)) = named(key) else { return key.into() };
        let tag = self.tag_of(kind, name.as_bytes());
        let text = to_digits(&[&tag, self.mixed(&tag, name.as_bytes()).as_slice()].concat());
        format!("{kind}{text}{rest}")
    }

    /// `outside` again; None: these keys did not make it.
    pub fn inside(&self, key: &str) -> Option<String> {
        let Some((kind, text, rest)) = named(key) else { return Some(key.into()) };
        let bytes = from_digits(text)?;
        let (tag, mixed) = bytes.split_at_checked(TAG)?;
        let name = self.mixed(tag, mixed);
        let differ = self.tag_of(kind, &name).iter().zip(tag).fold(0, |differ, (a, b)| differ | (a ^ b));
        if differ != 0 {
            return None;
        }
        Some(format!("{kind}{}{rest}", std::str::from_utf8(&name).ok()?))
    }
}

/// A key's part that tells something, what comes before it, and what comes after: the id of an agent, the path of a
/// segment, a state or a part.
fn named(key: &str) -> Option<(&str, &str, &str)> {
    let kind = POOLS.into_iter().chain([AGENTS]).find(|kind| key.starts_with(kind))?;
    let rest = &key[kind.len()..];
    let end = if kind == AGENTS {
        rest.find('/')
    } else {
        rest.strip_suffix(".safetensors").and_then(|path| path.rfind('.'))
    };
    let (name, rest) = rest.split_at(end.unwrap_or(rest.len()));
    (!name.is_empty()).then_some((kind, name, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_hidden_and_found_again() {
        let (keys, others) = (Names::new(&[1; 64]), Names::new(&[2; 64]));
        let long = "a".repeat(128);
        let names = [
            "agents/ada/head",
            "agents/ada/3-17-00112233445566778899aabbccddeeff",
            "agents/t.x.y/head",
            "segments/ab/ab0123.7.safetensors",
            "states/ab/abc.0.safetensors",
            "parts/u-c.12.safetensors",
            &format!("agents/{long}/head"),
            "agents/ada/",
        ];
        for name in names {
            let outside = keys.outside(name);
            let told = name.split(['/', '.', '-']).nth(1).unwrap();
            assert!(!outside.contains(told) || told.len() < 3, "{outside}");
            assert!(outside.split('/').all(|part| part.len() < 256) && outside != others.outside(name));
            assert_eq!(keys.inside(&outside).as_deref(), Some(name));
            assert_eq!(keys.outside(name), outside);
            assert_eq!(others.inside(&outside), None);
            let at = outside.find('/').unwrap() + 1;
            for i in at..outside[at..].find(['/', '.']).map_or(outside.len(), |end| at + end) {
                let digit = if &outside[i..=i] == "a" { "b" } else { "a" };
                assert_eq!(keys.inside(&[&outside[..i], digit, &outside[i + 1..]].concat()), None);
            }
        }
        assert_eq!(keys.outside("agents/ada/head").split('/').nth(1), keys.outside("agents/ada/x").split('/').nth(1));
        for name in ["nodes/s-1", "sweep", "seal", "probe/x", "", "agents/", "segments/"] {
            assert_eq!((keys.outside(name).as_str(), keys.inside(name).as_deref()), (name, Some(name)));
        }
        for name in ["agents/ada/head", "segments/ab/ab0123.7.safetensors", "segments/aa", "parts/77.1.safetensors"] {
            assert_eq!(keys.inside(name), None);
        }
    }
}
