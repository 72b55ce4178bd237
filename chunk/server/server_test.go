package server

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chunk/stream"
	"github.com/cairnstore/cairn/netplane/link"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// patience bounds every wait of these tests; none depends on how long it takes.
const patience = 20 * time.Second

const cluster = "test cluster"

// heldStore keeps requests until the test answers them, flushes excepted:
// they are answered inside Submit.
type heldStore struct {
	id      ids.StoreID
	mu      sync.Mutex
	batches [][]uint64 // block numbers, by Submit
	held    []func()
	came    chan struct{}
}

func newHeldStore() *heldStore {
	return &heldStore{id: ids.NewStoreID(), came: make(chan struct{}, 100_000)}
}

func (h *heldStore) ID() ids.StoreID { return h.id }

func (h *heldStore) Submit(reqs []*wire.Request, sink wire.Sink) {
	h.mu.Lock()
	var blocks []uint64
	var now []*wire.Reply
	for _, q := range reqs {
		blocks = append(blocks, uint64(q.Block))
		r := wire.Reply{Kind: q.Kind, ID: q.ID, Block: q.Block}
		switch {
		case q.Kind == wire.Flush:
			now = append(now, &r)
			continue
		case q.Kind == wire.Read:
			r.Data = make([]byte, int(q.Count)*ids.BlockSize)
		}
		h.held = append(h.held, func() {
			again := r // it is the sink's once given
			sink.Replies([]*wire.Reply{&again})
		})
	}
	h.batches = append(h.batches, blocks)
	h.mu.Unlock()
	if len(now) > 0 {
		sink.Replies(now)
	}
	for range reqs {
		h.came <- struct{}{}
	}
}

// wait returns when n more requests have come.
func (h *heldStore) wait(t *testing.T, n int) {
	t.Helper()
	for range n {
		select {
		case <-h.came:
		case <-time.After(patience):
			t.Fatal("requests do not come")
		}
	}
}

// answer answers what is held and returns how many those were.
func (h *heldStore) answer() int {
	h.mu.Lock()
	held := h.held
	h.held = nil
	h.mu.Unlock()
	for _, f := range held {
		f()
	}
	return len(held)
}

// journal is a log that tests read.
type journal struct {
	lines chan string
}

func (j journal) Write(b []byte) (int, error) {
	j.lines <- string(b)
	return len(b), nil
}

func (j journal) want(t *testing.T, part string) {
	t.Helper()
	select {
	case line := <-j.lines:
		if !strings.Contains(line, part) {
			t.Fatalf("logged %q, want %q in it", line, part)
		}
	case <-time.After(patience):
		t.Fatalf("nothing logged, want %q", part)
	}
}

func start(t *testing.T, cfg Config) (*Server, string, journal) {
	t.Helper()
	l, err := link.Listen(link.Config{Addr: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	j := journal{make(chan string, 100_000)}
	cfg.Cluster, cfg.Log = cluster, slog.New(slog.NewTextHandler(j, nil))
	s := New(cfg)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
		if n := s.Conns(); n != 0 {
			t.Errorf("%d connections are left", n)
		}
	})
	return s, l.Addr().String(), j
}

// raw is a client that the test plays by hand.
type raw struct {
	t  *testing.T
	nc net.Conn
	in *stream.Reader
}

func connect(t *testing.T, addr string) *raw {
	t.Helper()
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := nc.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	})
	return &raw{t, nc, stream.NewReader(nc)}
}

func (r *raw) send(qs ...*wire.Request) {
	r.t.Helper()
	var b []byte
	for _, q := range qs {
		b = append(wire.AppendRequest(b, q), q.Data...)
	}
	if _, err := r.nc.Write(b); err != nil {
		r.t.Fatal(err)
	}
}

func (r *raw) reply() *wire.Reply {
	r.t.Helper()
	rep, err := r.tryReply()
	if err != nil {
		r.t.Fatal(err)
	}
	return rep
}

func (r *raw) tryReply() (*wire.Reply, error) {
	for {
		f, ok, err := r.in.Next()
		if err != nil {
			return nil, err
		}
		if ok {
			return f.Reply()
		}
		if err := r.in.Fill(); err != nil {
			return nil, err
		}
	}
}

// closed fails unless the server closes the connection without another word.
func (r *raw) closed() {
	r.t.Helper()
	rep, err := r.tryReply()
	var ne net.Error
	if err == nil || errors.As(err, &ne) && ne.Timeout() {
		r.t.Fatalf("not closed: %+v, %v", rep, err)
	}
}

func hello() *wire.Request {
	return &wire.Request{Kind: wire.Hello, ID: 5, Version: wire.Version, Data: []byte(cluster)}
}

func greeted(t *testing.T, addr string) *raw {
	t.Helper()
	r := connect(t, addr)
	r.send(hello())
	if rep := r.reply(); rep.Err() != nil || rep.Kind != wire.Hello || rep.ID != 5 || rep.Count64 == 0 || rep.Version != wire.Version {
		t.Fatalf("greeted by %+v", rep)
	}
	return r
}

func TestGreeting(t *testing.T) {
	st := newHeldStore()
	_, addr, log := start(t, Config{Stores: []Store{st}, Handshake: 200 * time.Millisecond})
	for name, c := range map[string]struct {
		first *wire.Request
		kind  status.Kind
		text  string
	}{
		"other cluster": {&wire.Request{Kind: wire.Hello, Version: wire.Version, Data: []byte("other")}, status.Permission, "belongs to cluster"},
		"no cluster":    {&wire.Request{Kind: wire.Hello, Version: wire.Version}, status.Permission, "belongs to cluster"},
		"old protocol":  {&wire.Request{Kind: wire.Hello, Data: []byte(cluster)}, status.Unsupported, "protocol version 0"},
		"no greeting":   {&wire.Request{Kind: wire.Flush, Store: st.id}, status.Invalid, "before the greeting"},
		"ping first":    {&wire.Request{Kind: wire.Ping}, status.Invalid, "before the greeting"},
	} {
		t.Run(name, func(t *testing.T) {
			r := connect(t, addr)
			r.send(c.first)
			if rep := r.reply(); rep.Status != c.kind || !strings.Contains(rep.Detail, c.text) {
				t.Fatalf("got %v %q", rep.Status, rep.Detail)
			}
			r.closed()
			log.want(t, c.text)
		})
	}
	t.Run("a newer protocol is spoken to in ours", func(t *testing.T) {
		r := connect(t, addr)
		r.send(&wire.Request{Kind: wire.Hello, Version: wire.Version + 9, Data: []byte(cluster)})
		if rep := r.reply(); rep.Err() != nil || rep.Version != wire.Version {
			t.Fatalf("got %+v", rep)
		}
	})
	t.Run("silence", func(t *testing.T) {
		first := greeted(t, addr)
		connect(t, addr).closed()
		log.want(t, "no greeting")
		first.send(&wire.Request{Kind: wire.Ping}) // its own deadline is over and was lifted
		first.reply()
	})
	t.Run("a large first frame gets no memory", func(t *testing.T) {
		r := connect(t, addr)
		big := &wire.Request{Kind: wire.Write, Count: wire.MaxIO, Sums: make([]uint32, wire.MaxIO), Data: make([]byte, wire.MaxData)}
		if _, err := r.nc.Write(wire.AppendRequest(nil, big)); err != nil {
			t.Fatal(err)
		}
		r.closed()
		log.want(t, "at most 2048 are taken")
	})
	t.Run("twice", func(t *testing.T) {
		r := greeted(t, addr)
		r.send(hello())
		r.closed()
		log.want(t, "second greeting")
	})
}

// Whatever one connection does wrong, another one goes on, and the wrong one is
// closed with a line in the log.
func TestGarbageHarmsOnlyItsConnection(t *testing.T) {
	st := newHeldStore()
	_, addr, log := start(t, Config{Stores: []Store{st}})
	other := greeted(t, addr)
	alive := func() {
		t.Helper()
		other.send(&wire.Request{Kind: wire.Flush, ID: 77, Store: st.id})
		if rep := other.reply(); rep.ID != 77 || rep.Err() != nil {
			t.Fatalf("the other connection got %+v", rep)
		}
	}
	good := wire.AppendRequest(nil, &wire.Request{Kind: wire.Flush, Store: st.id})
	garbage := map[string][]byte{
		"noise":   bytes.Repeat([]byte("GET / HTTP/1.1\r\n"), 50),
		"a reply": wire.AppendReply(nil, &wire.Reply{Kind: wire.Flush}),
		"counts":  wire.AppendRequest(nil, &wire.Request{Kind: wire.Write, Count: 3, Store: st.id}),
		"kind":    wire.AppendRequest(nil, &wire.Request{Kind: 99, Store: st.id}),
	}
	for name, b := range garbage {
		r := greeted(t, addr)
		if _, err := r.nc.Write(b); err != nil {
			t.Fatal(err)
		}
		r.closed()
		log.want(t, "garbage")
		t.Log(name)
		alive()
	}
	for i := range good { // one wrong bit in each byte
		b := bytes.Clone(good)
		b[i] ^= 1 << (i % 8)
		r := greeted(t, addr)
		if _, err := r.nc.Write(b); err != nil {
			t.Fatal(err)
		}
		r.closed()
		log.want(t, "garbage")
	}
	alive()
}

// A connection cut at every byte of its greeting and its first request: nothing
// of a half request reaches the store, and the others go on.
func TestEveryTruncation(t *testing.T) {
	st := newHeldStore()
	_, addr, _ := start(t, Config{Stores: []Store{st}})
	q := &wire.Request{Kind: wire.Write, Store: st.id, Count: 1, Sums: []uint32{1}, Data: make([]byte, ids.BlockSize)}
	b := append(wire.AppendRequest(nil, hello()), hello().Data...)
	b = append(wire.AppendRequest(b, q), q.Data...)
	for cut := 0; cut < len(b); cut++ {
		if cut > 300 {
			cut += 200
		}
		r := connect(t, addr)
		if _, err := r.nc.Write(b[:min(cut, len(b)-1)]); err != nil {
			t.Fatal(err)
		}
		if err := r.nc.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, r.nc); err != nil && !errors.Is(err, io.EOF) {
			continue // reset: it had not read everything; the same to us
		}
	}
	r := greeted(t, addr)
	r.send(&wire.Request{Kind: wire.Flush, Store: st.id})
	r.reply()
	st.mu.Lock()
	defer st.mu.Unlock()
	if len(st.batches) != 1 {
		t.Fatalf("the store saw %d batches, want only the last flush", len(st.batches))
	}
}

// Requests that arrive together reach their stores as batches, in order; a
// store that is not here answers NotFound; each answer has its own number.
func TestBatchesByStore(t *testing.T) {
	a, b := newHeldStore(), newHeldStore()
	_, addr, _ := start(t, Config{Stores: []Store{a, b}})
	r := connect(t, addr)
	qs := []*wire.Request{hello()}
	for i := range uint64(30) {
		st := a.id
		if i/10%2 == 1 {
			st = b.id
		}
		qs = append(qs, &wire.Request{Kind: wire.Flush, ID: 1000 - i, Store: st, Block: ids.Block(i)})
	}
	qs = append(qs, &wire.Request{Kind: wire.Flush, ID: 1, Store: ids.NewStoreID()}, &wire.Request{Kind: wire.Ping, ID: 2})
	r.send(qs...)
	seen := map[uint64]*wire.Reply{}
	for range qs {
		rep := r.reply()
		seen[rep.ID] = rep
	}
	for i := range uint64(30) {
		if rep := seen[1000-i]; rep == nil || rep.Block != ids.Block(i) || rep.Err() != nil {
			t.Fatalf("request %d was answered by %+v", i, rep)
		}
	}
	if rep := seen[1]; rep == nil || rep.Status != status.NotFound || rep.Detail == "" {
		t.Fatalf("got %+v", rep)
	}
	if rep := seen[2]; rep == nil || rep.Kind != wire.Ping || rep.Err() != nil {
		t.Fatalf("got %+v", rep)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, st := range []*heldStore{a, b} {
		last := -1
		for _, batch := range st.batches {
			for _, n := range batch {
				if int(n) <= last {
					t.Fatalf("out of order: %v", st.batches)
				}
				last = int(n)
			}
		}
	}
}

// With the window exactly full a ping is still answered. A client that sends
// more is not read until the store has answered; nothing is lost.
func TestWindow(t *testing.T) {
	st := newHeldStore()
	q := func(i int) *wire.Request {
		return &wire.Request{Kind: wire.Write, ID: uint64(i), Store: st.id, Count: 1, Sums: []uint32{1}, Data: make([]byte, ids.BlockSize)}
	}
	const full = 10
	s, addr, _ := start(t, Config{Stores: []Store{st}, WindowBytes: full * stream.Cost(q(0))})
	r := greeted(t, addr)
	for i := range full {
		r.send(q(i))
	}
	r.send(&wire.Request{Kind: wire.Ping, ID: 99})
	if rep := r.reply(); rep.ID != 99 {
		t.Fatalf("got %+v", rep)
	}
	st.wait(t, full)
	const more = 500 // 2 MiB
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for i := range more {
			b := append(wire.AppendRequest(nil, q(full+i)), q(0).Data...)
			if _, err := r.nc.Write(b); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	got := map[uint64]bool{}
	for n := full; len(got) < full+more; {
		if held := st.answer(); held > full {
			t.Fatalf("%d requests at the store, %d fit the window", held, full)
		} else {
			for range held {
				got[r.reply().ID] = true
			}
			if n += held; n > full+more+full {
				break
			}
		}
	}
	<-sent
	if len(got) != full+more {
		t.Fatalf("%d answers for %d requests", len(got), full+more)
	}
	if s.Conns() != 1 {
		t.Fatalf("%d connections", s.Conns())
	}
}

// A client that asks and never reads its answers is not served without end,
// and does not keep Close waiting.
func TestAnswersNobodyReads(t *testing.T) {
	st := newHeldStore()
	const window = 1 << 20
	s, addr, _ := start(t, Config{Stores: []Store{st}, WindowBytes: window})
	r := greeted(t, addr)
	var b []byte
	for i := range uint64(2000) { // 2000 × 1 MiB of answers
		b = wire.AppendRequest(b, &wire.Request{Kind: wire.Read, ID: i, Store: st.id, Count: 256})
	}
	if _, err := r.nc.Write(b); err != nil {
		t.Fatal(err)
	}
	var c *conn
	s.mu.Lock()
	for c = range s.conns {
	}
	s.mu.Unlock()
	// Answer until the server reads no further: it waits for its replies to go.
	for served := 0; !waitsIn("(*conn).room"); {
		select {
		case <-st.came:
			st.answer()
			if served++; served > 200 {
				t.Fatal("it serves a client that reads nothing without end")
			}
		default:
			runtime.Gosched()
		}
	}
	if p := c.out.Pending(); p > 4*window {
		t.Fatalf("%d bytes of replies wait, the window is %d", p, window)
	}
}

// waitsIn reports whether a goroutine waits for a condition inside function f.
func waitsIn(f string) bool {
	b := make([]byte, 1<<20)
	for _, g := range strings.Split(string(b[:runtime.Stack(b, true)]), "\n\n") {
		if strings.Contains(g, "[sync.Cond.Wait") && strings.Contains(g, f) {
			return true
		}
	}
	return false
}

// A store that answers twice, or invents an answer, is ignored and logged.
func TestStoreThatAnswersTwice(t *testing.T) {
	st := newHeldStore()
	_, addr, log := start(t, Config{Stores: []Store{st}})
	r := greeted(t, addr)
	ask := func(id uint64) {
		r.send(&wire.Request{Kind: wire.Drop, ID: id, Store: st.id})
		st.wait(t, 1)
	}
	ask(1)
	st.mu.Lock()
	first := st.held[0]
	st.mu.Unlock()
	st.answer()
	if rep := r.reply(); rep.ID != 1 {
		t.Fatalf("got %+v", rep)
	}
	ask(2) // takes the slot of the first
	first()
	log.want(t, "nobody waits for")
	st.answer()
	if rep := r.reply(); rep.ID != 2 {
		t.Fatalf("got %+v", rep)
	}
}

func TestConnectionLimit(t *testing.T) {
	st := newHeldStore()
	s, addr, log := start(t, Config{Stores: []Store{st}, MaxConns: 2})
	a, b := greeted(t, addr), greeted(t, addr)
	connect(t, addr).closed()
	log.want(t, "as many as are allowed")
	if err := a.nc.Close(); err != nil {
		t.Fatal(err)
	}
	for s.Conns() > 1 {
		// the server notices the end; bounded by the test's own timeout
		b.send(&wire.Request{Kind: wire.Ping})
		b.reply()
	}
	greeted(t, addr)
}

// Close with requests at the store: connections end, late answers are dropped,
// and Serve refuses to begin again.
func TestCloseWithRequestsOutstanding(t *testing.T) {
	st := newHeldStore()
	s, addr, _ := start(t, Config{Stores: []Store{st}})
	r := greeted(t, addr)
	r.send(&wire.Request{Kind: wire.Drop, ID: 1, Store: st.id})
	st.wait(t, 1)
	for range 100 {
		greeted(t, addr)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if n := s.Conns(); n != 0 {
		t.Fatalf("%d connections after Close", n)
	}
	r.closed()
	if n := st.answer(); n != 1 {
		t.Fatalf("%d requests were held", n)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Serve(l); !errors.Is(err, status.Shutdown) {
		t.Fatalf("got %v", err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Fatalf("the listener is open: %v", err)
	}
}
