package guest

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"regexp"
	"strconv"
	"sync"
	"time"

	"github.com/cairnstore/cairn/proto/status"
)

// The bounds of a Console.
const (
	// CommandMaxBytes bounds one command.
	CommandMaxBytes = 64 << 10
	// OutputMaxBytes bounds what is kept of a command's output, and of what
	// the guest says unasked; the oldest is dropped. An emulated serial port
	// carries well below 1 MB a second, so this takes seconds to fill.
	OutputMaxBytes = 256 << 10
)

const (
	lineBytes     = 1024 // of base64: a terminal line holds 4,095
	dialEvery     = 50 * time.Millisecond
	loginEvery    = 2 * time.Second // a guest still booting loses what is typed
	loginEveryMax = 10 * time.Second
)

// Console is a guest's serial port. One program at a time can have it. Its
// methods are for one goroutine.
type Console struct {
	conn net.Conn
	mark string // what this console's loop in the guest prints; "" without one
	busy bool   // a command was given up and may still be running

	wg sync.WaitGroup

	mu      sync.Mutex
	buf     []byte        // what was read and not yet consumed, ≤ OutputMaxBytes
	lost    int           // bytes that were before buf
	dropped int           // those of them that nobody took, ≤ lost
	err     error         // why nothing more will come
	fresh   chan struct{} // capacity 1: buf or err has changed
}

// Output is what a command has said and how it ended.
type Output struct {
	Text   string // stdout and stderr, as they came
	Status int    // exit status
}

// Open connects to a console's socket, waiting for it to be there, and reads
// along. It types nothing: Login does.
func Open(ctx context.Context, socket string) (*Console, error) {
	var d net.Dialer
	for {
		conn, err := d.DialContext(ctx, "unix", socket)
		if err == nil {
			c := &Console{conn: conn, fresh: make(chan struct{}, 1)}
			c.wg.Add(1)
			go c.read()
			return c, nil
		}
		select {
		case <-time.After(dialEvery):
		case <-ctx.Done():
			return nil, status.Errorf(status.Timeout, "no guest console at %s: %w", socket, err)
		}
	}
}

// Dial is Open and Login: it returns once the guest runs commands.
func Dial(ctx context.Context, socket string) (*Console, error) {
	c, err := Open(ctx, socket)
	if err != nil {
		return nil, err
	}
	if err := c.Login(ctx); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

func (c *Console) read() {
	defer c.wg.Done()
	part := make([]byte, 32<<10)
	for {
		n, err := c.conn.Read(part)
		c.mu.Lock()
		c.buf = append(c.buf, part[:n]...)
		if over := len(c.buf) - OutputMaxBytes; over > 0 {
			// Dropped by halves, so that what stays is not moved at each read.
			over = min(len(c.buf), over+OutputMaxBytes/2)
			c.buf = append([]byte(nil), c.buf[over:]...)
			c.lost, c.dropped = c.lost+over, c.dropped+over
		}
		if err != nil {
			c.err = status.Errorf(status.Unavailable, "the guest's console is gone: %w", err)
		}
		c.mu.Unlock()
		select {
		case c.fresh <- struct{}{}:
		default:
		}
		if err != nil {
			return
		}
	}
}

// Login gets the guest's shell to run commands for Run, from whatever state
// the console is in: booting, at a prompt, or in a loop an earlier program has
// left.
func (c *Console) Login(ctx context.Context) error {
	wait := loginEvery
	for {
		var nonce [8]byte
		_, _ = rand.Read(nonce[:]) // crypto/rand.Read never fails (Go 1.24)
		mark := fmt.Sprintf("#%x#", nonce)
		// The quotes keep the echo of this line from looking like the mark.
		// An interrupt first, and alone: it flushes what was typed before it.
		line := fmt.Sprintf("\x03\ncairn-loop '%s''%s'\n", mark[:4], mark[4:])
		if err := c.Send(ctx, []byte(line)); err != nil {
			return err
		}
		try, cancel := context.WithTimeout(ctx, wait)
		_, err := c.Expect(try, regexp.MustCompile(`\n`+mark+` ready\r?\n`))
		cancel()
		if err == nil {
			c.mark, c.busy = mark, false
			return nil
		}
		if ctx.Err() != nil || !errors.Is(err, status.Timeout) {
			return fmt.Errorf("no shell on the guest's console: %w", err)
		}
		wait = min(2*wait, loginEveryMax)
	}
}

// Send types raw bytes.
func (c *Console) Send(ctx context.Context, data []byte) error {
	stop := context.AfterFunc(ctx, func() {
		// Only unblocks the write below; a failure shows there.
		_ = c.conn.SetWriteDeadline(time.Unix(1, 0))
	})
	_, err := c.conn.Write(data)
	if !stop() && ctx.Err() != nil {
		err = errors.Join(ctx.Err(), c.conn.SetWriteDeadline(time.Time{}))
	}
	if err != nil {
		return status.Errorf(status.Of(ctxKind(ctx, err)), "type on the guest's console: %w", err)
	}
	return nil
}

// ctxKind prefers the context's reason: it is the cause of the failed call.
func ctxKind(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// Expect waits until re matches what the guest says, and returns all up to the
// end of the match, which is consumed.
func (c *Console) Expect(ctx context.Context, re *regexp.Regexp) ([]byte, error) {
	return c.take(ctx, re.String(), func(buf []byte, _ int) int {
		if loc := re.FindIndex(buf); loc != nil {
			return loc[1]
		}
		return -1
	})
}

// until is Expect for a plain text, which is found in time linear in what the
// guest says.
func (c *Console) until(ctx context.Context, text string) ([]byte, error) {
	return c.take(ctx, text, func(buf []byte, seen int) int {
		from := max(0, seen-len(text))
		if i := bytes.Index(buf[from:], []byte(text)); i >= 0 {
			return from + i + len(text)
		}
		return -1
	})
}

// take waits until find returns how many bytes of the buffer to consume. seen
// tells it how many it has searched before.
func (c *Console) take(ctx context.Context, what string, find func(buf []byte, seen int) int) ([]byte, error) {
	searched := 0 // bytes since the console was opened, lost ones included
	for {
		c.mu.Lock()
		if n := find(c.buf, max(0, searched-c.lost)); n >= 0 {
			out := append([]byte(nil), c.buf[:n]...)
			c.buf = c.buf[n:]
			c.lost += n
			c.mu.Unlock()
			return out, nil
		}
		searched = c.lost + len(c.buf)
		err, tail := c.err, c.tail()
		c.mu.Unlock()
		if err != nil {
			return nil, fmt.Errorf("%w; last it said %q", err, tail)
		}
		select {
		case <-c.fresh:
		case <-ctx.Done():
			return nil, status.Errorf(status.Of(ctx.Err()), "the guest did not say %q: %w; last it said %q", what, ctx.Err(), tail)
		}
	}
}

// tail is the end of the unread output; called with mu held.
func (c *Console) tail() string { return lastBytes(c.buf, 200) }

// Run runs a shell command (sh -c, in a shell of its own) and waits for it.
// Its stdin is empty. A command that fails is no error: see Output.Status.
// When ctx ends first the command goes on; the next Run interrupts it.
func (c *Console) Run(ctx context.Context, command string) (Output, error) {
	if len(command) > CommandMaxBytes {
		return Output{}, status.Errorf(status.TooBig, "a guest command of %d bytes; at most %d", len(command), CommandMaxBytes)
	}
	if c.mark == "" || c.busy {
		if err := c.Login(ctx); err != nil {
			return Output{}, err
		}
	}
	c.busy = true
	if err := c.Send(ctx, encode(command)); err != nil {
		return Output{}, err
	}
	if _, err := c.until(ctx, "\n"+c.mark+" begin\n"); err != nil {
		return Output{}, err
	}
	c.mu.Lock()
	dropped := c.dropped
	c.mu.Unlock()
	end := "\n" + c.mark + " end "
	text, err := c.until(ctx, end)
	if err != nil {
		return Output{}, fmt.Errorf("guest command %.60q: %w", command, err)
	}
	digits, err := c.until(ctx, "\n")
	if err != nil {
		return Output{}, fmt.Errorf("guest command %.60q: %w", command, err)
	}
	code, err := strconv.Atoi(string(digits[:len(digits)-1]))
	if err != nil {
		return Output{}, status.Errorf(status.Internal, "guest command's exit status: %w", err)
	}
	c.busy = false
	c.mu.Lock()
	dropped = c.dropped - dropped
	c.mu.Unlock()
	if dropped > 0 {
		return Output{}, status.Errorf(status.TooBig, "guest command %.60q said more than %d bytes", command, OutputMaxBytes)
	}
	return Output{Text: string(text[:len(text)-len(end)]), Status: code}, nil
}

// Must is Run for a command that has to succeed; it returns its output
// without the last newline.
func (c *Console) Must(ctx context.Context, command string) (string, error) {
	out, err := c.Run(ctx, command)
	if err != nil {
		return "", err
	}
	if out.Status != 0 {
		return "", status.Errorf(status.IO, "guest command %.100q ended with status %d: %s", command, out.Status, lastBytes([]byte(out.Text), 500))
	}
	return string(bytes.TrimRight([]byte(out.Text), "\n")), nil
}

// encode is a command in the loop's form: base64 in lines, then a dot.
func encode(command string) []byte {
	text := base64.StdEncoding.EncodeToString([]byte(command))
	var b bytes.Buffer
	for len(text) > 0 {
		n := min(len(text), lineBytes)
		b.WriteString(text[:n])
		b.WriteByte('\n')
		text = text[n:]
	}
	b.WriteString(".\n")
	return b.Bytes()
}

// Close gives the console back to a person's shell and disconnects.
func (c *Console) Close() error {
	var err error
	c.mu.Lock()
	gone := c.err != nil
	c.mu.Unlock()
	if c.mark != "" && !c.busy && !gone {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		// A guest that went away meanwhile needs no farewell.
		if serr := c.Send(ctx, []byte("quit\n")); serr != nil && !errors.Is(serr, net.ErrClosed) {
			c.mark = ""
		}
	}
	if cerr := c.conn.Close(); cerr != nil {
		err = status.Errorf(status.IO, "close the guest's console: %w", cerr)
	}
	c.wg.Wait()
	return err
}
