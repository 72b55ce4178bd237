package client_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
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
	"github.com/cairnstore/cairn/proto/status"
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
	flushes []func()
	wg      sync.WaitGroup
}

func newMemStore(async bool) *memStore {
	return &memStore{id: ids.NewStoreID(), async: async, blocks: map[ids.Block][]byte{}}
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
				m.blocks[q.Block+ids.Block(b)] = append([]byte(nil), q.Data[b*ids.BlockSize:(b+1)*ids.BlockSize]...)
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
	log  *bytes.Buffer
}

type lockedWriter struct {
	mu sync.Mutex
	w  *bytes.Buffer
}

func (l *lockedWriter) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(b)
}

const cluster = "test cluster"

func startNode(t testing.TB, addr string, stores ...server.Store) *node {
	t.Helper()
	l, err := link.Listen(link.Config{Addr: addr})
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, addr: l.Addr().String(), done: make(chan error, 1), log: &bytes.Buffer{}}
	n.srv = server.New(server.Config{Cluster: cluster, Stores: stores, Log: slog.New(slog.NewTextHandler(&lockedWriter{w: n.log}, nil))})
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
	events chan string
	onUp   func(gen uint64)

	mu      sync.Mutex
	waiting map[uint64]func(*wire.Reply)
	up      uint64
}

func newProbe() *probe {
	return &probe{events: make(chan string, 1000), waiting: map[uint64]func(*wire.Reply){}}
}

func (p *probe) Up(gen uint64) {
	p.mu.Lock()
	p.up = gen
	p.mu.Unlock()
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
func noLeak(t *testing.T) {
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		for strings.Count(stacks(), "cairn/chunk/") > strings.Count(stacks(), "cairn/chunk/client_test") {
			select {
			case <-ctx.Done():
				t.Errorf("goroutines are left:\n%s", stacks())
				return
			default:
				runtime.Gosched()
			}
		}
	})
}

var _ = net.ErrClosed
var _ = status.OK
