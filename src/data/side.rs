//! One side of a row: a prompt, and its reply.

use super::message::Message;
use super::values::Result;

/// Excludes these turns of the field `name` from the loss, except those with `loss: true`. `only`: what alone carries loss then.
///
/// # Errors
/// An assistant turn with `weight` 1.
pub(super) fn exclude(turns: &mut [Message], name: &str, only: &str) -> Result<()> {
    for (i, turn) in turns.iter_mut().enumerate().filter(|(_, turn)| turn.loss.is_none()) {
        if turn.weighted {
            return Err(format!(
                "message {} of {name} has weight 1, but {only}: write loss: true in the turn to train on it all the same, or weight: 0, or \
                 remove the weight",
                i + 1
            ));
        }
        turn.loss = Some(false);
    }
    Ok(())
}

/// One side of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Side {
    /// All turns, the reply included.
    pub messages: Vec<Message>,
    /// Number of turns before the reply, which is the last turn. Without a reply: the number of all turns.
    pub prompt: usize,
}

impl Side {
    /// A prompt, excluded from the loss, and its reply. `name`: the field of the prompt.
    ///
    /// # Errors
    /// A turn that is to carry loss.
    pub fn with_reply(mut messages: Vec<Message>, reply: Message, name: &str) -> Result<Self> {
        for (i, message) in messages.iter_mut().enumerate() {
            if message.loss == Some(true) || message.weighted {
                let mark = if message.weighted { "weight: 1" } else { "loss: true" };
                return Err(format!(
                    "message {} of {name} has a mark to carry loss ({mark}), but in an attack or pair row only the reply does: remove \
                     the mark, or write a chat row with messages and label",
                    i + 1
                ));
            }
            message.loss = Some(false);
        }
        let prompt = messages.len();
        messages.push(reply);
        Ok(Self { messages, prompt })
    }

    /// The turns before the reply.
    pub fn prompt_messages(&self) -> Vec<Message> {
        self.messages[..self.prompt].to_vec()
    }

    /// Whether there is a reply.
    pub fn has_reply(&self) -> bool {
        self.prompt < self.messages.len()
    }
}
