//! A client's statements as its session takes them along to another gate.
//!
//! What it is NOT: the gate that takes them up ([`Names::adopt`]).

use super::Names;

impl Names {
    /// The client's statements under its own names, the unnamed one too: each with its Parse message's body behind the
    /// name. While nothing is in flight.
    pub fn export(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let text = |name: &[u8], text: &[u8]| match self.deallocates.get(name) {
            Some(taken) => {
                let taken = String::from_utf8_lossy(taken).replace('"', "\"\"");
                format!("DEALLOCATE \"{taken}\"\0\0\0").into_bytes()
            }
            None => text.to_vec(),
        };
        let named = self.named.iter().map(|(name, statement)| (name.to_vec(), text(name, &statement.text)));
        let unnamed = (!self.unnamed.is_empty()).then(|| (Vec::new(), text(b"", &self.unnamed)));
        named.chain(unnamed).collect()
    }
}
