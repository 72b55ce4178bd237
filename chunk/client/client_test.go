package client_test

import (
	"bytes"
	"fmt"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chunk/client"
	"github.com/cairnstore/cairn/chunk/server"
	"github.com/cairnstore/cairn/netplane/link"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/wire"
)

// patience bounds every wait of these tests; none depends on how long it takes.
const patience = 20 * time.Second

// memStore is a store in memory. It answers each batch backwards, on another
// goroutine when async, and holds back flushes until they are released.
type memStore struct {
	id    ids.StoreID
	async bool

	mu      sync.Mutex
	blocks  map[ids.Block][]byte
	version map[ids.Block]ids.Version // the highest wins, as in a real store
	flushes []func()
	wg      sync.WaitGroup
}

func newMemStore(async bool) *memStore {
	return &memStore{id: ids.NewStoreID(), async: async, blocks: map[ids.Block][]byte{}, version: map[ids.Block]ids.Version{}}
}

func (m *memStore) ID() ids.StoreID { return m.id }

func (m *memStore) Submit(reqs []*wire.Request, sink wire.Sink) {
	var rs []*wire.Reply
	m.mu.Lock()
	for i := len(reqs) - 1; i >= 0; i-- {
		q := reqs[i]
		r := &wire.Reply{Kind: q.Kind, ID: q.ID}
		switch q.Kind {
		case wire.Write:
			for b := range q.Count {
				at := q.Block + ids.Block(b)
				if q.Version >= m.version[at] {
					m.version[at] = q.Version
					m.blocks[at] = append([]byte(nil), q.Data[b*ids.BlockSize:(b+1)*ids.BlockSize]...)
				}
			}
		case wire.Read:
			r.Data = make([]byte, int(q.Count)*ids.BlockSize)
			for b := range q.Count {
				copy(r.Data[b*ids.BlockSize:], m.blocks[q.Block+ids.Block(b)])
			}
		case wire.Flush:
			m.flushes = append(m.flushes, func() { sink.Replies([]*wire.Reply{r}) })
			continue
		}
		rs = append(rs, r)
	}
	m.mu.Unlock()
	if len(rs) == 0 {
		return
	}
	if !m.async {
		sink.Replies(rs)
		return
	}
	m.wg.Add(1)
	go func() {
		defer m.wg.Done()
		sink.Replies(rs)
	}()
}

// release answers every flush that waits, and reports how many.
func (m *memStore) release() int {
	m.mu.Lock()
	fs := m.flushes
	m.flushes = nil
	m.mu.Unlock()
	for _, f := range fs {
		f()
	}
	return len(fs)
}

// node is a chunk server on loopback.
type node struct {
	t    testing.TB
	srv  *server.Server
	addr string
	done chan error
}

const cluster = "test cluster"

func startNode(t testing.TB, addr string, stores ...server.Store) *node {
	t.Helper()
	l, err := link.Listen(link.Config{Addr: addr})
	if err != nil {
		t.Fatal(err)
	}
	return serveNode(t, l, stores...)
}

func serveNode(t testing.TB, l net.Listener, stores ...server.Store) *node {
	n := &node{t: t, addr: l.Addr().String(), done: make(chan error, 1)}
	n.srv = server.New(server.Config{Cluster: cluster, Stores: stores})
	go func() { n.done <- n.srv.Serve(l) }()
	t.Cleanup(n.stop)
	return n
}

func (n *node) stop() {
	if n.done == nil {
		return
	}
	if err := n.srv.Close(); err != nil {
		n.t.Error(err)
	}
	if err := <-n.done; err != nil {
		n.t.Error(err)
	}
	n.done = nil
}

// probe is a Handler that tells what happens over a channel.
type probe struct {
	events  chan string
	mu      sync.Mutex
	waiting map[uint64]func(*wire.Reply)
}

func newProbe() *probe {
	return &probe{events: make(chan string, 1000), waiting: map[uint64]func(*wire.Reply){}}
}

func (p *probe) Up(gen uint64) {
	p.events <- fmt.Sprintf("up %d", gen)
}

func (p *probe) Down(gen uint64, why string) { p.events <- fmt.Sprintf("down %d: %s", gen, why) }
func (p *probe) Lost(why string)             { p.events <- "lost: " + why }

func (p *probe) Replies(_ uint64, rs []*wire.Reply) {
	for _, r := range rs {
		p.mu.Lock()
		f := p.waiting[r.ID]
		delete(p.waiting, r.ID)
		p.mu.Unlock()
		if f == nil {
			p.events <- fmt.Sprintf("unexpected reply %d", r.ID)
			continue
		}
		f(r)
	}
}

// expect notes what to do with the answer to request id.
func (p *probe) expect(id uint64, f func(*wire.Reply)) {
	p.mu.Lock()
	p.waiting[id] = f
	p.mu.Unlock()
}

// want waits for the next event, which must begin so.
func (p *probe) want(t testing.TB, prefix string) string {
	t.Helper()
	select {
	case e := <-p.events:
		if !strings.HasPrefix(e, prefix) {
			t.Fatalf("event %q, want %q", e, prefix)
		}
		return e
	case <-time.After(patience):
		t.Fatalf("no event, want %q\n%s", prefix, stacks())
	}
	return ""
}

func stacks() string {
	b := make([]byte, 1<<20)
	return string(b[:runtime.Stack(b, true)])
}

func dial(t testing.TB, addr string, h client.Handler) client.Link {
	t.Helper()
	l := client.Dial(client.Config{Addr: addr, Cluster: cluster}, h)
	t.Cleanup(l.Close)
	return l
}

func block(n uint64) []byte {
	return bytes.Repeat([]byte{byte(n), byte(n >> 8), 0xa5, byte(n * 7)}, ids.BlockSize/4)
}

// noLeak fails when goroutines of this module are left at the end of the test.
// It is to be called first, so that it runs after everything has been closed.
func noLeak(t *testing.T) {
	t.Cleanup(func() {
		deadline := time.Now().Add(patience)
		for {
			all := stacks()
			left := 0
			for _, g := range strings.Split(all, "\n\n") {
				for _, pkg := range []string{"chunk/client.", "chunk/server.", "chunk/stream."} {
					if strings.Contains(g, pkg) {
						left++
					}
				}
			}
			if left == 0 {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("goroutines are left:\n%s", all)
			}
			runtime.Gosched()
		}
	})
}

// write sends writes of one block each and waits for all answers.
func write(t testing.TB, l client.Link, p *probe, gen uint64, store ids.StoreID, from, n uint64) {
	t.Helper()
	var wg sync.WaitGroup
	var reqs []*wire.Request
	for i := from; i < from+n; i++ {
		wg.Add(1)
		p.expect(i, func(r *wire.Reply) {
			defer wg.Done()
			if r.Err() != nil || r.Kind != wire.Write {
				t.Errorf("write %d: %v %v", i, r.Kind, r.Err())
			}
		})
		reqs = append(reqs, &wire.Request{Kind: wire.Write, ID: i, Store: store, Block: ids.Block(i), Count: 1, Version: 1,
			Sums: []uint32{0}, Data: block(i)})
	}
	l.Send(gen, reqs)
	wait(t, &wg)
}

func wait(t testing.TB, wg *sync.WaitGroup) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		wg.Wait()
	}()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("answers are missing\n%s", stacks())
	}
}

// Many goroutines write and read at once, over TCP, TLS and in process; the
// store answers every batch backwards and from other goroutines.
func TestManyRequestsAnsweredInAnyOrder(t *testing.T) {
	noLeak(t)
	st := newMemStore(true)
	t.Cleanup(st.wg.Wait) // after the node is closed: until then a late request may come
	n := startNode(t, "127.0.0.1:0", st)
	srvTLS, cliTLS := testTLS(t)
	secure := startTLSNode(t, srvTLS, st)
	for name, open := range map[string]func(h client.Handler) client.Link{
		"tcp":   func(h client.Handler) client.Link { return dial(t, n.addr, h) },
		"local": func(h client.Handler) client.Link { return client.Local(st, h) },
		"tls": func(h client.Handler) client.Link {
			l := client.Dial(client.Config{Addr: secure.addr, Cluster: cluster, Dialer: link.Dialer{TLS: cliTLS}}, h)
			t.Cleanup(l.Close)
			return l
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newProbe()
			l := open(p)
			p.want(t, "up 1")
			var wg sync.WaitGroup
			for w := range uint64(8) {
				wg.Add(1)
				go func() {
					defer wg.Done()
					var checks []func()
					for round := range uint64(20) {
						first := w*100_000 + round*100
						write(t, l, p, 1, st.id, first, 30)
						checks = append(checks, readBack(t, l, p, st.id, first, 30))
					}
					for _, check := range checks { // late: the data is the handler's
						check()
					}
				}()
			}
			wg.Wait()
			l.Close()
			if len(p.events) > 0 {
				t.Fatalf("unexpected: %s", <-p.events)
			}
		})
	}
}

// readBack reads n blocks with one request each and one request for all, and
// returns a check of the data.
func readBack(t testing.TB, l client.Link, p *probe, store ids.StoreID, from, n uint64) func() {
	t.Helper()
	var wg sync.WaitGroup
	var reqs []*wire.Request
	var mu sync.Mutex // guards got
	got := map[uint64]*wire.Reply{}
	ask := func(id, first, count uint64) {
		wg.Add(1)
		p.expect(id, func(r *wire.Reply) {
			defer wg.Done()
			mu.Lock()
			defer mu.Unlock()
			got[id] = r
		})
		reqs = append(reqs, &wire.Request{Kind: wire.Read, ID: id, Store: store, Block: ids.Block(first), Count: uint32(count)})
	}
	var all []byte
	for i := from; i < from+n; i++ {
		ask(i, i, 1)
		all = append(all, block(i)...)
	}
	ask(from+n, from, n)
	l.Send(1, reqs)
	wait(t, &wg)
	return func() {
		for i := range n {
			if !bytes.Equal(got[from+i].Data, block(from+i)) {
				t.Errorf("read of block %d: wrong data", from+i)
			}
		}
		if !bytes.Equal(got[from+n].Data, all) {
			t.Errorf("read of %d blocks from %d: wrong data", n, from)
		}
	}
}

// A slow flush keeps neither other requests nor pings waiting, also when more
// is asked for than the window holds; everything is answered in the end.
func TestBeyondTheWindow(t *testing.T) {
	noLeak(t)
	st := newMemStore(false)
	n := startNode(t, "127.0.0.1:0", st)
	p := newProbe()
	l := dial(t, n.addr, p)
	p.want(t, "up 1")
	var wg sync.WaitGroup
	const flushes = 24 // 24 reads of 4 MiB are 6 windows
	var reqs []*wire.Request
	for i := range uint64(flushes) {
		wg.Add(2)
		p.expect(2*i, func(*wire.Reply) { wg.Done() })
		p.expect(2*i+1, func(r *wire.Reply) {
			defer wg.Done()
			if len(r.Data) != wire.MaxData {
				t.Errorf("read %d brought %d bytes", i, len(r.Data))
			}
		})
		reqs = append(reqs, &wire.Request{Kind: wire.Flush, ID: 2 * i, Store: st.id},
			&wire.Request{Kind: wire.Read, ID: 2*i + 1, Store: st.id, Count: wire.MaxIO})
	}
	l.Send(1, reqs)
	released := 0
	for deadline := time.Now().Add(patience); released < flushes; released += st.release() {
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d flushes reached the store", released, flushes)
		}
		runtime.Gosched()
	}
	wait(t, &wg)
	if len(p.events) > 0 {
		t.Fatalf("unexpected: %s", <-p.events)
	}
}
