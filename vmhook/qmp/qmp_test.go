package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/cairnstore/cairn/proto/status"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}`

// peer is the other end of a client: a monitor that says what the test wants.
type peer struct {
	t    *testing.T
	conn net.Conn
	in   *bufio.Reader
}

// request is a command as it came.
type request struct {
	Execute string          `json:"execute"`
	OOB     string          `json:"exec-oob"`
	ID      uint64          `json:"id"`
	Args    json.RawMessage `json:"arguments"`
}

func (p *peer) say(format string, args ...any) {
	p.t.Helper()
	if _, err := fmt.Fprintf(p.conn, format+"\r\n", args...); err != nil {
		p.t.Error(err)
	}
}

func (p *peer) hangUp() {
	p.t.Helper()
	if err := p.conn.Close(); err != nil {
		p.t.Error(err)
	}
}

func (p *peer) hear() request {
	p.t.Helper()
	line, err := p.in.ReadString('\n')
	if err != nil {
		p.t.Errorf("the client hung up: %v", err)
		return request{}
	}
	var r request
	if err := json.Unmarshal([]byte(line), &r); err != nil {
		p.t.Errorf("line %q: %v", line, err)
	}
	return r
}

// pair returns a client whose greeting and negotiation are done.
func pair(t *testing.T) (*Client, *peer) {
	t.Helper()
	ours, theirs := net.Pipe()
	p := &peer{t: t, conn: theirs, in: bufio.NewReader(theirs)}
	negotiated := make(chan request, 1)
	go func() {
		p.say("%s", greeting)
		r := p.hear()
		p.say(`{"return": {}, "id": %d}`, r.ID)
		negotiated <- r
	}()
	c, err := New(testContext(t), ours)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if err := theirs.Close(); err != nil {
			t.Error(err)
		}
	})
	if r := <-negotiated; r.Execute != "qmp_capabilities" || string(r.Args) != `{"enable":["oob"]}` {
		t.Errorf("negotiation: %+v %s", r, r.Args)
	}
	return c, p
}

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestCommandsAreAnsweredById(t *testing.T) {
	c, p := pair(t)
	if c.Version() != "7.2.22" {
		t.Errorf("version %q", c.Version())
	}
	results := make(chan string, 2)
	for _, name := range []string{"a", "b"} {
		go func() {
			var got string
			err := c.Do(testContext(t), name, map[string]any{"x": name}, &got)
			results <- fmt.Sprint(name, got, err)
		}()
	}
	first, second := p.hear(), p.hear()
	// Events come in between, answers in any order.
	p.say(`{"event": "STOP", "timestamp": {"seconds": 5, "microseconds": 6}, "data": {"k": 1}}`)
	p.say(`{"return": "for-%s", "id": %d}`, second.Execute, second.ID)
	p.say(`{"return": "for-%s", "id": %d}`, first.Execute, first.ID)
	for range 2 {
		if got := <-results; got != "afor-a<nil>" && got != "bfor-b<nil>" {
			t.Error(got)
		}
	}
	if e := <-c.Events(); e.Name != "STOP" || e.Seconds != 5 || e.Micros != 6 || string(e.Data) != `{"k": 1}` {
		t.Errorf("event %+v", e)
	}
}

func TestErrorsKeepTheirClass(t *testing.T) {
	for class, kind := range map[string]status.Kind{
		"DeviceNotFound": status.NotFound, "CommandNotFound": status.Unsupported,
		"DeviceNotActive": status.Conflict, "GenericError": status.Invalid, "Future": status.Invalid,
	} {
		c, p := pair(t)
		go func() {
			p.say(`{"error": {"class": "%s", "desc": "no way"}, "id": %d}`, class, p.hear().ID)
		}()
		err := c.Do(testContext(t), "cmd", nil, nil)
		var e *Error
		if !errors.As(err, &e) || e.Class != class || e.Command != "cmd" || !strings.Contains(err.Error(), "no way") {
			t.Errorf("%s: %v", class, err)
		}
		wrapped := fmt.Errorf("while testing: %w", err)
		if !errors.Is(wrapped, kind) || status.Of(wrapped) != kind {
			t.Errorf("%s is of kind %v, want %v", class, status.Of(wrapped), kind)
		}
	}
}

// TestAHangingMonitor reads commands and answers none: the caller's deadline
// counts, commands queue up to the bound QEMU has, and out-of-band still works.
func TestAHangingMonitor(t *testing.T) {
	c, p := pair(t)
	for i := range PendingMax {
		gone, cancel := context.WithCancel(context.Background())
		cancel()
		if err := c.Do(gone, "stop", nil, nil); !errors.Is(err, status.Unknown) {
			t.Fatalf("command %d: %v", i, err)
		}
	}
	if err := c.Do(testContext(t), "stop", nil, nil); !errors.Is(err, status.Unavailable) {
		t.Fatalf("one command too many: %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- c.DoOOB(testContext(t), "yank", nil, nil) }()
	var ids []uint64
	for range PendingMax {
		ids = append(ids, p.hear().ID)
	}
	oob := p.hear()
	if oob.OOB != "yank" {
		t.Fatalf("heard %+v", oob)
	}
	p.say(`{"return": {}, "id": %d}`, oob.ID)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	// Late answers to commands nobody waits for make room again.
	for _, id := range ids {
		p.say(`{"return": {}, "id": %d}`, id)
	}
	go func() { p.say(`{"return": 7, "id": %d}`, p.hear().ID) }()
	var n int
	for { // the late answers may still be on their way
		err := c.Do(testContext(t), "again", nil, &n)
		if err == nil {
			break
		}
		if !errors.Is(err, status.Unavailable) {
			t.Fatal(err)
		}
	}
	if n != 7 {
		t.Errorf("answer %d", n)
	}
}

// TestUnreadEventsBlockNothing sends more events than are kept: a command is
// still answered, and the newest events are there.
func TestUnreadEventsBlockNothing(t *testing.T) {
	c, p := pair(t)
	const extra = 10
	go func() {
		r := p.hear()
		for i := range EventsMax + extra {
			p.say(`{"event": "E%d", "timestamp": {}}`, i)
		}
		p.say(`{"return": {}, "id": %d}`, r.ID)
	}()
	if err := c.Do(testContext(t), "x", nil, nil); err != nil {
		t.Fatal(err)
	}
	if got := c.Dropped(); got != extra {
		t.Errorf("%d events dropped, want %d", got, extra)
	}
	if e := <-c.Events(); e.Name != fmt.Sprintf("E%d", extra) {
		t.Errorf("oldest event kept: %s", e.Name)
	}
}

func TestLongLines(t *testing.T) {
	c, p := pair(t)
	long := strings.Repeat("x", 1<<20)
	go func() { p.say(`{"return": "%s", "id": %d}`, long, p.hear().ID) }()
	var got string
	if err := c.Do(testContext(t), "x", nil, &got); err != nil || got != long {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	go func() {
		p.hear()
		part := []byte(strings.Repeat("y", 1<<20))
		for range LineMaxBytes>>20 + 1 {
			if _, err := p.conn.Write(part); err != nil {
				return // the client has hung up, as it should
			}
		}
	}()
	err := c.Do(testContext(t), "x", nil, nil)
	if !errors.Is(err, status.Unknown) || !errors.Is(c.Err(), status.TooBig) {
		t.Fatalf("endless line: %v, %v", err, c.Err())
	}
}

// TestWhatEndsAConnection: each ends it with a reason, and commands after it
// are refused at once.
func TestWhatEndsAConnection(t *testing.T) {
	for what, say := range map[string]func(*peer){
		"end of file":  func(p *peer) { p.hangUp() },
		"no JSON":      func(p *peer) { p.say("hello") },
		"parse error":  func(p *peer) { p.say(`{"error": {"class": "GenericError", "desc": "JSON parse error"}}`) },
		"reply to all": func(p *peer) { p.say(`{"return": {}}`) },
	} {
		c, p := pair(t)
		go func() {
			p.hear()
			say(p)
		}()
		err := c.Do(testContext(t), "x", nil, nil)
		if !errors.Is(err, status.Unknown) {
			t.Errorf("%s: %v", what, err)
		}
		<-c.Done()
		for range c.Events() { // closed
		}
		if err := c.Do(testContext(t), "y", nil, nil); !errors.Is(err, status.Unavailable) || c.Err() == nil {
			t.Errorf("%s: afterwards %v, reason %v", what, err, c.Err())
		}
	}
}

func TestNewFails(t *testing.T) {
	for what, c := range map[string]struct {
		talk func(*peer)
		kind status.Kind
	}{
		"hangs up":   {func(p *peer) { p.hangUp() }, status.Unavailable},
		"no monitor": {func(p *peer) { p.say(`{"hello": 1}`) }, status.Unsupported},
		"refuses": {func(p *peer) {
			p.say("%s", greeting)
			p.say(`{"error": {"class": "CommandNotFound", "desc": "no"}, "id": %d}`, p.hear().ID)
		}, status.Unsupported},
		"answers nonsense": {func(p *peer) { p.say("]") }, status.Unavailable},
	} {
		ours, theirs := net.Pipe()
		p := &peer{t: t, conn: theirs, in: bufio.NewReader(theirs)}
		go c.talk(p)
		if got, err := New(testContext(t), ours); got != nil || !errors.Is(err, c.kind) {
			t.Errorf("%s: %v, want %v", what, err, c.kind)
		}
		if _, err := ours.Write([]byte("x")); err == nil {
			t.Errorf("%s: the connection is still open", what)
		}
		p.hangUp()
	}
	// Silence: another program has the monitor.
	ours, theirs := net.Pipe()
	gone, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := New(gone, ours); !errors.Is(err, status.Timeout) {
		t.Errorf("silence: %v", err)
	}
	if err := theirs.Close(); err != nil {
		t.Error(err)
	}
}

func TestArgumentsThatAreNoJSON(t *testing.T) {
	c, p := pair(t)
	for range 2 * PendingMax { // they take no place in the queue
		if err := c.Do(testContext(t), "x", make(chan int), nil); !errors.Is(err, status.Invalid) {
			t.Fatal(err)
		}
	}
	go func() { p.say(`{"return": {}, "id": %d}`, p.hear().ID) }()
	if err := c.Do(testContext(t), "x", nil, nil); err != nil {
		t.Fatal(err)
	}
}
