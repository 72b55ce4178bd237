package client_test

import (
	"bytes"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cairnstore/cairn/chunk/client"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/wire"
)

// chain is a Handler that sends the next request from inside Replies, as an
// engine does, until it has sent all.
type chain struct {
	link     client.Link
	store    ids.StoreID
	up, last uint64
	done     chan struct{}
}

func (c *chain) Up(gen uint64)       { c.up = gen }
func (c *chain) Down(uint64, string) {}
func (c *chain) Lost(string)         {}

func (c *chain) Replies(gen uint64, rs []*wire.Reply) {
	for _, r := range rs {
		if r.ID == c.last {
			close(c.done)
			return
		}
		c.link.Send(gen, []*wire.Request{{Kind: wire.Read, ID: r.ID + 1, Store: c.store, Count: 1}})
	}
}

// Up comes before Local returns, and answers come inside Send, at any depth,
// without a deadlock.
func TestLocalAnswersInsideSend(t *testing.T) {
	st := newMemStore(false)
	c := &chain{store: st.id, last: 100, done: make(chan struct{})}
	c.link = client.Local(st, c)
	if c.up != 1 {
		t.Fatalf("generation %d is up", c.up)
	}
	c.link.Send(2, []*wire.Request{{Kind: wire.Read, ID: 100, Store: st.id, Count: 1}}) // no such generation: dropped
	select {
	case <-c.done:
		t.Fatal("a request of another generation was answered")
	default:
	}
	c.link.Send(1, []*wire.Request{{Kind: wire.Read, ID: 1, Store: st.id, Count: 1}})
	<-c.done // closed inside Send, or never
	c.link.Close()
}

// Close waits for a handler call that has begun, and drops what comes later.
func TestLocalClose(t *testing.T) {
	noLeak(t)
	st := newMemStore(true)
	p := newProbe()
	l := client.Local(st, p)
	p.want(t, "up 1")
	entered, leave := make(chan struct{}), make(chan struct{})
	var returned atomic.Bool
	p.expect(1, func(*wire.Reply) {
		close(entered)
		<-leave
		returned.Store(true)
	})
	p.expect(2, func(*wire.Reply) { t.Error("an answer after Close") })
	l.Send(1, []*wire.Request{{Kind: wire.Read, ID: 1, Store: st.id, Count: 1}})
	l.Send(1, []*wire.Request{{Kind: wire.Flush, ID: 2, Store: st.id}})
	<-entered
	closing, closed := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(closed)
		close(closing)
		l.Close()
		if !returned.Load() {
			t.Error("Close came back while a handler call was running")
		}
	}()
	<-closing
	for range 100 {
		runtime.Gosched() // gives a wrong Close its chance
	}
	close(leave)
	<-closed
	if st.release() != 1 {
		t.Fatal("the flush did not reach the store")
	}
	l.Send(1, []*wire.Request{{Kind: wire.Flush, ID: 3, Store: st.id}})
	if st.release() != 0 {
		t.Fatal("a request reached the store after Close")
	}
	st.wg.Wait()
}

// intoStore fills Request.Into, as a cache hit does.
type intoStore struct{}

func (intoStore) Submit(reqs []*wire.Request, sink wire.Sink) {
	for _, q := range reqs {
		copy(q.Into, block(9))
		sink.Replies([]*wire.Reply{{Kind: q.Kind, ID: q.ID, Data: q.Into}})
	}
}

func TestIntoIsForLocalLinksOnly(t *testing.T) {
	noLeak(t)
	st := newMemStore(false)
	n := startNode(t, "127.0.0.1:0", st)
	into := make([]byte, ids.BlockSize)
	ask := func(l client.Link, p *probe) []byte {
		var wg sync.WaitGroup
		wg.Add(1)
		var got []byte
		p.expect(1, func(r *wire.Reply) {
			got = r.Data
			wg.Done()
		})
		l.Send(1, []*wire.Request{{Kind: wire.Read, ID: 1, Store: st.id, Count: 1, Into: into}})
		wait(t, &wg)
		return got
	}
	p := newProbe()
	if got := ask(client.Local(intoStore{}, p), p); &got[0] != &into[0] || !bytes.Equal(into, block(9)) {
		t.Fatal("the buffer was not filled")
	}
	q := newProbe()
	l := dial(t, n.addr, q)
	q.want(t, "up 1")
	clear(into)
	into[0] = 1
	if got := ask(l, q); &got[0] == &into[0] || into[0] != 1 {
		t.Fatal("the buffer was touched over TCP")
	}
}
