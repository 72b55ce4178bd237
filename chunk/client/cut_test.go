package client_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chunk/client"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/wire"
)

// cutter forwards connections to a server and cuts each after some bytes, in
// one direction or the other, wherever in a frame that is.
type cutter struct {
	l    net.Listener
	to   string
	wg   sync.WaitGroup
	mu   sync.Mutex
	rng  *rand.Rand
	cuts int // connections still to be cut
}

func newCutter(t *testing.T, to string, seed uint64, cuts int) *cutter {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cutter{l: l, to: to, rng: rand.New(rand.NewPCG(seed, 7)), cuts: cuts}
	c.wg.Add(1)
	go c.accept(t)
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		c.wg.Wait()
	})
	return c
}

func (c *cutter) accept(t *testing.T) {
	defer c.wg.Done()
	for {
		a, err := c.l.Accept()
		if err != nil {
			return
		}
		b, err := net.Dial("tcp", c.to)
		if err != nil {
			t.Error(err)
			return
		}
		up, down := c.limits()
		var once sync.Once
		end := func() { // both ends close whichever direction ended; the second close says so
			once.Do(func() {
				for _, nc := range []net.Conn{a, b} {
					if err := nc.Close(); err != nil {
						t.Error(err)
					}
				}
			})
		}
		c.wg.Add(2)
		for _, d := range []struct {
			to, from net.Conn
			limit    int64
		}{{b, a, up}, {a, b, down}} {
			go func() {
				defer c.wg.Done()
				defer end()
				_, _ = io.CopyN(d.to, d.from, d.limit) // however it ends, both are closed
			}()
		}
	}
}

// limits returns how many bytes pass upward and downward.
func (c *cutter) limits() (up, down int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	up, down = 1<<40, 1<<40
	if c.cuts == 0 {
		return up, down
	}
	c.cuts--
	if c.rng.IntN(2) == 0 {
		return c.rng.Int64N(300_000), down
	}
	return up, c.rng.Int64N(300_000)
}

func (c *cutter) left() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cuts
}

// resender keeps writes and reads of its own blocks in flight, and sends again
// over the next connection what one left unanswered.
type resender struct {
	t      *testing.T
	store  ids.StoreID
	first  ids.Block
	link   chan client.Link
	cut    *cutter
	mu     sync.Mutex
	gen    uint64
	nextID uint64
	open   map[uint64]*wire.Request
	step   map[ids.Block]uint64 // writes acknowledged
	done   chan struct{}
	over   bool
}

const lanes, leastSteps = 8, 40

func (r *resender) Up(gen uint64) {
	r.mu.Lock()
	if gen <= r.gen {
		r.t.Errorf("generation %d after %d", gen, r.gen)
	}
	r.gen = gen
	var again []*wire.Request
	if len(r.open) == 0 {
		for i := range ids.Block(lanes) {
			again = append(again, r.write(r.first+i))
		}
	} else {
		for _, q := range r.open {
			again = append(again, q)
		}
	}
	r.mu.Unlock()
	l := <-r.link
	r.link <- l
	l.Send(gen, again)
}

func (r *resender) Down(gen uint64, _ string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if gen != r.gen {
		r.t.Errorf("generation %d went down while %d is up", gen, r.gen)
	}
}

func (r *resender) Lost(string) {}

// write makes the next write of a block. r.mu is held.
func (r *resender) write(b ids.Block) *wire.Request {
	r.nextID++
	q := &wire.Request{Kind: wire.Write, ID: r.nextID, Store: r.store, Block: b, Count: 1, Version: ids.Version(r.step[b] + 1), Sums: []uint32{0},
		Data: r.content(b, r.step[b]+1)}
	r.open[q.ID] = q
	return q
}

func (r *resender) content(b ids.Block, step uint64) []byte {
	return bytes.Repeat([]byte(fmt.Sprintf("%8d%8d", b, step)), ids.BlockSize/16)
}

func (r *resender) Replies(gen uint64, rs []*wire.Reply) {
	r.mu.Lock()
	var next []*wire.Request
	for _, rep := range rs {
		q := r.open[rep.ID]
		if q == nil || rep.Kind != q.Kind || rep.Err() != nil || gen != r.gen {
			r.t.Errorf("answer %+v over %d while %d is up", rep, gen, r.gen)
			continue
		}
		delete(r.open, rep.ID)
		if q.Kind == wire.Write {
			r.step[q.Block]++
			r.nextID++
			rd := &wire.Request{Kind: wire.Read, ID: r.nextID, Store: r.store, Block: q.Block, Count: 1}
			r.open[rd.ID] = rd
			next = append(next, rd)
			continue
		}
		if !bytes.Equal(rep.Data, r.content(q.Block, r.step[q.Block])) {
			r.t.Errorf("block %d: wrong data after %d writes", q.Block, r.step[q.Block])
		}
		if r.step[q.Block] < leastSteps || r.cut.left() > 0 {
			next = append(next, r.write(q.Block))
		} else if len(r.open) == 0 && !r.over {
			r.over = true
			close(r.done)
		}
	}
	r.mu.Unlock()
	l := <-r.link
	r.link <- l
	l.Send(gen, next)
}

// Connections cut anywhere in both directions: what is sent again arrives, no
// answer comes over the wrong connection, twice, or with other data.
func TestConnectionsCutAnywhere(t *testing.T) {
	noLeak(t)
	st := newMemStore(true)
	t.Cleanup(st.wg.Wait) // after the node is closed: until then a late request may come
	n := startNode(t, "127.0.0.1:0", st)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var all []*resender
	for i := range uint64(8) {
		cut := newCutter(t, n.addr, seed+i, 6)
		r := &resender{t: t, store: st.id, first: ids.Block(i * 100), link: make(chan client.Link, 1), cut: cut,
			open: map[uint64]*wire.Request{}, step: map[ids.Block]uint64{}, done: make(chan struct{})}
		r.link <- dial(t, cut.l.Addr().String(), r)
		all = append(all, r)
	}
	for _, r := range all {
		select {
		case <-r.done:
		case <-time.After(patience):
			t.Fatalf("not all is answered\n%s", stacks())
		}
	}
}
