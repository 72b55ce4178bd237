package store

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

const (
	testSeg  = 64 * blockBytes
	testSize = logStart*blockBytes + 40*testSeg
	testBoot = "boot-1"
)

var testID = ids.StoreID{1, 2, 3, 4, 5, 6, 7, 8, 9}

// inbox collects replies by request id.
type inbox struct {
	mu   sync.Mutex
	cond *sync.Cond
	got  map[uint64]*wire.Reply
}

func newInbox() *inbox {
	b := &inbox{got: map[uint64]*wire.Reply{}}
	b.cond = sync.NewCond(&b.mu)
	return b
}

func (b *inbox) Replies(rs []*wire.Reply) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, r := range rs {
		b.got[r.ID] = r
	}
	b.cond.Broadcast()
}

// asker is the connection of ask to every store; asked numbers its requests.
var (
	asker = newInbox()
	asked atomic.Uint64
)

// ask submits one request and waits for its reply.
func ask(s *Store, q wire.Request) *wire.Reply {
	b, id := asker, 1<<40+asked.Add(1)
	q.ID = id
	s.Submit([]*wire.Request{&q}, b)
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.got[id] == nil {
		b.cond.Wait()
	}
	r := b.got[id]
	delete(b.got, id)
	return r
}

func mustOK(t testing.TB, r *wire.Reply) *wire.Reply {
	t.Helper()
	if r.Status != status.OK {
		t.Fatalf("%s: %v", r.Kind, r.Err())
	}
	return r
}

func formatMem(t testing.TB) *disk.Mem {
	t.Helper()
	d := disk.NewMem(testSize)
	if err := Make(d, Format{ID: testID, Incarnation: 1, Cluster: "c", SegmentBytes: testSeg}); err != nil {
		t.Fatal(err)
	}
	return d
}

func open(t testing.TB, d disk.Disk, boot string) *Store {
	t.Helper()
	s, err := Open(Config{Disk: d, BootID: boot})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// blockOf returns the data a test writes for a value.
func blockOf(v uint64) []byte {
	b := make([]byte, blockBytes)
	rng := rand.New(rand.NewPCG(v, 9))
	for i := 0; i < blockBytes; i += 512 {
		le.PutUint64(b[i:], v)
		le.PutUint64(b[i+8:], rng.Uint64())
	}
	return b
}

// put is a Write of blocks that all hold values from val on.
func put(c ids.ChunkID, b ids.Block, n int, ver ids.Version, val uint64) wire.Request {
	q := wire.Request{Kind: wire.Write, Volume: 1, Chunk: c, Block: b, Count: uint32(n), Version: ver}
	for i := range n {
		d := blockOf(val + uint64(i))
		q.Data = append(q.Data, d...)
		q.Sums = append(q.Sums, wire.BlockSum(1, c, 0, b+ids.Block(i), ver, d))
	}
	return q
}

// state is what a test knows of one block.
type state struct {
	kind wire.EntryKind
	ver  ids.Version
	val  uint64
}

type blockID struct {
	c ids.ChunkID
	b ids.Block
}

// model is the semantics over a map.
type model map[blockID]state

func (m model) set(k blockID, s state) {
	if s.kind == wire.EntryHole {
		delete(m, k)
	} else {
		m[k] = s
	}
}

func (m model) clone() model {
	c := model{}
	for k, v := range m {
		c[k] = v
	}
	return c
}

// verify reads every block of the test's range and compares.
func verify(t testing.TB, s *Store, m model, epoch ids.Epoch, what string) {
	t.Helper()
	for c := ids.ChunkID(1); c <= testChunks; c++ {
		for b := ids.Block(0); b < testBlocks; b += 8 {
			r := mustOK(t, ask(s, wire.Request{Kind: wire.Read, Flags: wire.FlagEntries, Volume: 1, Epoch: epoch, Chunk: c, Block: b, Count: 8}))
			for i := range ids.Block(8) {
				if why := compare(m[blockID{c, b + i}], r.Entries[i], r.Data[i*blockBytes:(i+1)*blockBytes]); why != "" {
					t.Fatalf("%s: chunk %d block %d: %s", what, c, b+i, why)
				}
			}
		}
	}
}

func compare(want state, e wire.Entry, data []byte) string {
	if e.Kind != want.kind || e.Version != want.ver {
		return fmt.Sprintf("holds %d at %s, want %d at %s", e.Kind, e.Version, want.kind, want.ver)
	}
	exp := make([]byte, blockBytes)
	if want.kind == wire.EntryData {
		exp = blockOf(want.val)
	}
	if !bytes.Equal(data, exp) {
		return fmt.Sprintf("wrong data for value %d", want.val)
	}
	return ""
}

const (
	testChunks = 3
	testBlocks = 160
)
