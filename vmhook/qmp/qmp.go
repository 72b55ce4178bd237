// Package qmp speaks QEMU's machine protocol: commands with ids, events, and
// out-of-band execution, over a connection the caller has made.
//
// Duty: one Client per connection: greeting, capabilities, Do, DoOOB, Events.
// Floor: F2. It dials nothing, knows no command by name but qmp_capabilities,
// and never retries. Source: docs/interop/qmp-spec of QEMU 7.2.
package qmp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/cairnstore/cairn/proto/status"
)

// The bounds of a Client.
const (
	// LineMaxBytes bounds one message; the longest real ones
	// (query-qmp-schema) have about 200 KiB.
	LineMaxBytes = 8 << 20
	// EventsMax bounds the events nobody has read yet; the oldest are dropped
	// and counted (Dropped), because an unread event must never block a reply.
	EventsMax = 256
	// PendingMax bounds the in-band commands without an answer, given up or not.
	// QEMU 7.2 queues 8; beyond that it reads nothing more, not even what is to
	// overtake them.
	PendingMax = 6
	// PendingOOBMax bounds the out-of-band ones.
	PendingOOBMax = 2
)

// Event is something QEMU tells without being asked.
type Event struct {
	Name    string          `json:"event"`
	Data    json.RawMessage `json:"data"`
	Seconds int64           // when, by the host's clock
	Micros  int64
}

// Error is QEMU's answer to a command it did not carry out.
type Error struct {
	Command string
	Class   string `json:"class"`
	Desc    string `json:"desc"`
}

// Error returns QEMU's own sentence, with the command.
func (e *Error) Error() string { return fmt.Sprintf("QEMU refused %s: %s", e.Command, e.Desc) }

// Is reports whether target is the kind of error (proto/status) this class is.
func (e *Error) Is(target error) bool {
	k, ok := target.(status.Kind)
	return ok && k == e.kind()
}

// As gives the kind to errors.As, so that status.Of finds it.
func (e *Error) As(target any) bool {
	k, ok := target.(*status.Kind)
	if ok {
		*k = e.kind()
	}
	return ok
}

func (e *Error) kind() status.Kind {
	switch e.Class {
	case "DeviceNotFound":
		return status.NotFound
	case "CommandNotFound":
		return status.Unsupported
	case "DeviceNotActive":
		return status.Conflict
	default:
		return status.Invalid
	}
}

// Client is one monitor connection. All methods may be called at any time by
// many goroutines.
type Client struct {
	rwc     io.ReadWriteCloser
	oob     bool // the monitor can execute out of band
	version string
	out     chan []byte   // ≤ PendingMax + PendingOOBMax lines for the writer
	events  chan Event    // ≤ EventsMax
	done    chan struct{} // closed when the connection is over
	wg      sync.WaitGroup

	mu      sync.Mutex
	pending map[uint64]waiter // by id; what was sent and not answered
	waiting map[bool]int      // how many of them: false in-band, ≤ PendingMax; true out-of-band, ≤ PendingOOBMax
	nextID  uint64
	dropped uint64
	err     error // why the connection is over; set before done is closed
	ended   bool
}

// waiter is a command without an answer. Nobody may wait for it any more; it
// stays counted, because QEMU still has it.
type waiter struct {
	answer chan message // capacity 1
	oob    bool
}

// message is anything a monitor says.
type message struct {
	QMP *struct {
		Version struct {
			QEMU struct{ Major, Minor, Micro int } `json:"qemu"`
		} `json:"version"`
		Capabilities []string `json:"capabilities"`
	} `json:"QMP"`
	Event     string          `json:"event"`
	Data      json.RawMessage `json:"data"`
	Timestamp struct {
		Seconds int64 `json:"seconds"`
		Micros  int64 `json:"microseconds"`
	} `json:"timestamp"`
	ID     *uint64         `json:"id"`
	Return json.RawMessage `json:"return"`
	Err    *Error          `json:"error"`
}

// New reads the greeting on rwc and negotiates; the client owns rwc from here
// on, also when New fails. A monitor serves one client at a time: until the
// one before has gone there is no greeting, and ctx bounds that wait.
func New(ctx context.Context, rwc io.ReadWriteCloser) (*Client, error) {
	c := &Client{
		rwc:     rwc,
		out:     make(chan []byte, PendingMax+PendingOOBMax),
		events:  make(chan Event, EventsMax),
		done:    make(chan struct{}),
		pending: map[uint64]waiter{},
		waiting: map[bool]int{},
	}
	greeting := make(chan message, 1)
	c.wg.Add(2)
	go c.read(greeting)
	go c.write()
	if err := c.negotiate(ctx, greeting); err != nil {
		if cerr := c.Close(); cerr != nil {
			err = fmt.Errorf("%w; closing: %v", err, cerr)
		}
		return nil, err
	}
	return c, nil
}

func (c *Client) negotiate(ctx context.Context, greeting <-chan message) error {
	var g message
	select {
	case g = <-greeting:
	case <-c.done:
		return status.Errorf(status.Unavailable, "the QEMU monitor hung up before its greeting: %w", c.Err())
	case <-ctx.Done():
		return status.Errorf(status.Timeout, "no greeting from the QEMU monitor; another program may be using its socket: %w", ctx.Err())
	}
	if g.QMP == nil {
		return status.Errorf(status.Unsupported, "the socket is not a QEMU monitor: its first line is no QMP greeting")
	}
	v := g.QMP.Version.QEMU
	c.version = fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro)
	enable := []string{}
	for _, name := range g.QMP.Capabilities {
		if name == "oob" {
			c.oob = true
			enable = append(enable, name)
		}
	}
	return c.Do(ctx, "qmp_capabilities", map[string]any{"enable": enable}, nil)
}

// Version returns QEMU's version, "7.2.22".
func (c *Client) Version() string { return c.version }

// Events returns the channel of events. It is closed when the connection is.
func (c *Client) Events() <-chan Event { return c.events }

// Dropped counts the events that were lost because nobody read them.
func (c *Client) Dropped() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.dropped
}

// Done is closed when the connection is over; Err says why.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err returns why the connection is over, nil while it is not.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Do executes a command and decodes its answer into result (nil: ignored).
// When ctx ends first, the command may still take effect (status.Unknown).
func (c *Client) Do(ctx context.Context, command string, args, result any) error {
	return c.do(ctx, false, command, args, result)
}

// DoOOB executes a command out of band: it overtakes one that hangs. Only few
// commands can (yank, migrate-recover, …).
func (c *Client) DoOOB(ctx context.Context, command string, args, result any) error {
	if !c.oob {
		return status.Errorf(status.Unsupported, "QEMU %s cannot execute %s out of band", c.version, command)
	}
	return c.do(ctx, true, command, args, result)
}

func (c *Client) do(ctx context.Context, oob bool, command string, args, result any) error {
	answer, err := c.send(oob, command, args)
	if err != nil {
		return err
	}
	select {
	case m := <-answer:
		return decode(m, command, result)
	case <-c.done:
		return status.Errorf(status.Unknown, "%s: the connection to QEMU ended without an answer: %w", command, c.Err())
	case <-ctx.Done():
		return status.Errorf(status.Unknown, "%s: no answer from QEMU: %w", command, ctx.Err())
	}
}

func decode(m message, command string, result any) error {
	if m.Err != nil {
		m.Err.Command = command
		return m.Err
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(m.Return, result); err != nil {
		return status.Errorf(status.Unsupported, "%s: unexpected answer from QEMU: %w", command, err)
	}
	return nil
}

// send queues a command and registers who waits for its answer. It never
// blocks: a command too many is refused (status.Unavailable: it was not sent).
func (c *Client) send(oob bool, command string, args any) (<-chan message, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return nil, status.Errorf(status.Unavailable, "the connection to QEMU is over: %w", c.err)
	}
	verb, limit := "execute", PendingMax
	if oob {
		verb, limit = "exec-oob", PendingOOBMax
	}
	if c.waiting[oob] >= limit {
		return nil, status.Errorf(status.Unavailable, "%s: %d commands wait for QEMU, which does not answer", command, limit)
	}
	req := map[string]any{verb: command, "id": c.nextID + 1}
	if args != nil {
		req["arguments"] = args
	}
	line, err := json.Marshal(req)
	if err != nil {
		return nil, status.Errorf(status.Invalid, "%s: arguments: %w", command, err)
	}
	c.nextID++
	c.waiting[oob]++
	w := waiter{answer: make(chan message, 1), oob: oob}
	c.pending[c.nextID] = w
	c.out <- append(line, '\n') // has room: one place per waiting command
	return w.answer, nil
}

// Close ends the connection and waits for its goroutines.
func (c *Client) Close() error {
	err := c.end(status.Errorf(status.Shutdown, "closed here"))
	c.wg.Wait()
	return err
}

// end closes the connection once; the first reason stays.
func (c *Client) end(why error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return nil
	}
	c.ended, c.err = true, why
	close(c.done)
	if err := c.rwc.Close(); err != nil {
		return status.Errorf(status.IO, "close the connection to QEMU: %w", err)
	}
	return nil
}

// fail is end for the goroutines: an error of closing joins the reason.
func (c *Client) fail(why error) {
	if err := c.end(why); err != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.err = errors.Join(c.err, err)
	}
}

func (c *Client) write() {
	defer c.wg.Done()
	for {
		select {
		case line := <-c.out:
			if _, err := c.rwc.Write(line); err != nil {
				c.fail(status.Errorf(status.Unavailable, "write to QEMU: %w", err))
				return
			}
		case <-c.done:
			return
		}
	}
}

func (c *Client) read(greeting chan<- message) {
	defer c.wg.Done()
	defer close(c.events)
	r := bufio.NewReaderSize(c.rwc, 64<<10)
	for first := true; ; first = false {
		line, err := readLine(r)
		if err != nil {
			c.fail(err)
			return
		}
		var m message
		if err := json.Unmarshal(line, &m); err != nil {
			c.fail(status.Errorf(status.Unsupported, "QEMU monitor sent what is no JSON: %w", err))
			return
		}
		switch {
		case first:
			greeting <- m
		case m.Event != "":
			c.offer(Event{m.Event, m.Data, m.Timestamp.Seconds, m.Timestamp.Micros})
		default:
			if err := c.answer(m); err != nil {
				c.fail(err)
				return
			}
		}
	}
}

// answer hands a reply to the one that waits; nobody may, after a deadline.
func (c *Client) answer(m message) error {
	if m.ID == nil {
		// Without an id QEMU complains about a line it could not parse.
		desc := "a reply without an id"
		if m.Err != nil {
			desc = m.Err.Desc
		}
		return status.Errorf(status.Internal, "QEMU did not understand a command: %s", desc)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if w, ok := c.pending[*m.ID]; ok {
		delete(c.pending, *m.ID)
		c.waiting[w.oob]--
		w.answer <- m // has room: one answer per id
	}
	return nil
}

// offer queues an event, dropping the oldest one when nobody reads.
func (c *Client) offer(e Event) {
	for {
		select {
		case c.events <- e:
			return
		default:
		}
		select {
		case <-c.events:
			c.mu.Lock()
			c.dropped++
			c.mu.Unlock()
		default:
		}
	}
}

// readLine returns the next line, at most LineMaxBytes long.
func readLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		line = append(line, part...)
		switch {
		case len(line) > LineMaxBytes:
			return nil, status.Errorf(status.TooBig, "a line of the QEMU monitor is longer than %d bytes", LineMaxBytes)
		case err == nil:
			if line = bytes.TrimSpace(line); len(line) > 0 {
				return line, nil
			}
			line = nil
		case errors.Is(err, bufio.ErrBufferFull):
		case errors.Is(err, io.EOF):
			return nil, status.Errorf(status.Unavailable, "QEMU closed the connection: %w", err)
		default:
			return nil, status.Errorf(status.Unavailable, "read from QEMU: %w", err)
		}
	}
}
