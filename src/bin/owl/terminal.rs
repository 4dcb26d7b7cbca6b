//! The terminal: its size, its keys, and a screen of its own that is given back however owl ends.

use std::io::{self, Write};
use std::time::{Duration, Instant};

/// What a person does at the terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// q, Escape or Ctrl-C.
    Quit,
    /// Any other key, or a new size: draw again.
    Other,
}

/// Columns and lines; 80 by 24 where nobody says.
pub fn size() -> (usize, usize) {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the request fills the struct it is given, or fails.
    let asked = unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size) };
    match (asked, size.ws_col, size.ws_row) {
        (0, columns, lines) if columns > 0 && lines > 0 => (columns.into(), lines.into()),
        _ => (80, 24),
    }
}

/// Whether a person sits at both ends.
pub fn is_interactive() -> bool {
    // SAFETY: it looks at a descriptor.
    unsafe { libc::isatty(libc::STDIN_FILENO) == 1 && libc::isatty(libc::STDOUT_FILENO) == 1 }
}

/// The terminal in raw mode, on its other screen, until this is dropped.
pub struct Screen {
    before: libc::termios,
}

impl Screen {
    /// Takes the terminal.
    pub fn open() -> io::Result<Self> {
        // SAFETY: a termios is numbers; tcgetattr fills it, or fails.
        let mut before: libc::termios = unsafe { std::mem::zeroed() };
        if unsafe { libc::tcgetattr(libc::STDIN_FILENO, &raw mut before) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let mut raw = before;
        raw.c_lflag &= !(libc::ICANON | libc::ECHO | libc::ISIG);
        raw.c_cc[libc::VMIN] = 0;
        raw.c_cc[libc::VTIME] = 0;
        // SAFETY: as above.
        if unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const raw) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let screen = Screen { before };
        print!("\x1b[?1049h\x1b[?25l\x1b[2J");
        io::stdout().flush()?;
        Ok(screen)
    }

    /// Shows lines from the top, and nothing below them.
    pub fn show(&self, lines: &[String]) -> io::Result<()> {
        let mut text = String::from("\x1b[H");
        for (number, line) in lines.iter().enumerate() {
            if number > 0 {
                text.push_str("\r\n");
            }
            text.push_str(line);
            text.push_str("\x1b[0m\x1b[K");
        }
        text.push_str("\x1b[J");
        let mut out = io::stdout();
        out.write_all(text.as_bytes())?;
        out.flush()
    }

    /// Waits for a key or a new size, so long and no longer.
    pub fn wait(&self, timeout: Duration) -> Option<Key> {
        let until = Instant::now() + timeout;
        let before = size();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let mut keys = libc::pollfd {
                fd: libc::STDIN_FILENO,
                events: libc::POLLIN,
                revents: 0,
            };
            let step = i32::try_from(left.as_millis().min(200))
                .unwrap_or(200)
                .max(1);
            // SAFETY: one descriptor, and its number.
            let ready = unsafe { libc::poll(&raw mut keys, 1, step) };
            if size() != before {
                return Some(Key::Other);
            }
            if ready > 0 {
                let mut bytes = [0_u8; 64];
                // SAFETY: it writes no more than the buffer holds.
                let read = unsafe {
                    libc::read(libc::STDIN_FILENO, bytes.as_mut_ptr().cast(), bytes.len())
                };
                let Ok(read @ 1..) = usize::try_from(read) else {
                    // Whoever sat there is gone.
                    return Some(Key::Quit);
                };
                return Some(match bytes[..read] {
                    [b'q' | b'Q' | 3 | 27] => Key::Quit,
                    _ => Key::Other,
                });
            }
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        print!("\x1b[?25h\x1b[?1049l");
        let _ = io::stdout().flush();
        // SAFETY: what tcgetattr gave.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const self.before) };
    }
}
