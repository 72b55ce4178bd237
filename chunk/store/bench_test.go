package store

import (
	"math/rand/v2"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// loop keeps depth requests in flight and refills as replies come.
type loop struct {
	b     *testing.B
	s     *Store
	mu    sync.Mutex
	left  int
	busy  int
	make  func() *wire.Request
	done  chan struct{}
	inSub bool
	ready int // replies that came while a Submit was running
}

func (l *loop) Replies(rs []*wire.Reply) {
	for _, r := range rs {
		if r.Status != status.OK {
			l.b.Error(r.Err())
		}
	}
	l.mu.Lock()
	l.ready += len(rs)
	if l.inSub {
		l.mu.Unlock()
		return
	}
	l.inSub = true
	for l.ready > 0 {
		n := min(l.ready, l.left)
		l.busy -= l.ready - n
		l.ready = 0
		l.left -= n
		if n == 0 {
			break
		}
		qs := make([]*wire.Request, n)
		for i := range qs {
			qs[i] = l.make()
		}
		l.mu.Unlock()
		l.s.Submit(qs, l)
		l.mu.Lock()
	}
	l.inSub = false
	end := l.busy == 0
	l.mu.Unlock()
	if end {
		close(l.done)
	}
}

func cpu() float64 {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		return 0
	}
	return float64(r.Utime.Nano()+r.Stime.Nano()) / 1000
}

func benchFile(b *testing.B) *Store {
	d, err := disk.Create(filepath.Join(b.TempDir(), "store"), 4<<30)
	if err != nil {
		b.Fatal(err)
	}
	if err := Make(d, Format{ID: testID, Incarnation: 1}); err != nil {
		b.Fatal(err)
	}
	s, err := Open(Config{Disk: d, BootID: testBoot})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := s.Close(); err != nil {
			b.Error(err)
		}
		if err := d.Close(); err != nil {
			b.Error(err)
		}
	})
	return s
}

func (l *loop) run(depth int) {
	l.left, l.busy, l.ready, l.done = l.b.N, depth, depth, make(chan struct{})
	l.b.ResetTimer()
	before := cpu()
	l.Replies(nil)
	<-l.done
	l.b.ReportMetric((cpu()-before)/float64(l.b.N), "cpu-µs/op")
	l.b.ReportMetric(float64(l.b.N)/l.b.Elapsed().Seconds(), "op/s")
}

func benchWrites(b *testing.B, depth int) {
	s := benchFile(b)
	ctr, data := uint64(0), blockOf(1)
	rng := rand.New(rand.NewPCG(1, 1))
	l := &loop{b: b, s: s, make: func() *wire.Request {
		ctr++
		c, blk, ver := ids.ChunkID(1+rng.IntN(8)), ids.Block(rng.IntN(16384)), ids.MakeVersion(1, ctr)
		return &wire.Request{Kind: wire.Write, Volume: 1, Chunk: c, Block: blk, Count: 1, Version: ver, Data: data,
			Sums: []uint32{wire.BlockSum(1, c, 0, blk, ver, data)}}
	}}
	l.run(depth)
}

func BenchmarkWriteDepth32(b *testing.B) { benchWrites(b, 32) }
func BenchmarkWriteDepth1(b *testing.B)  { benchWrites(b, 1) }

func benchReads(b *testing.B, depth int) {
	s := benchFile(b)
	for c := range ids.ChunkID(8) {
		for blk := ids.Block(0); blk < 1024; blk += 256 {
			mustOK(b, ask(s, put(c+1, blk, 256, ids.MakeVersion(1, 1), 1)))
		}
	}
	rng := rand.New(rand.NewPCG(1, 1))
	into := make([]byte, blockBytes)
	l := &loop{b: b, s: s, make: func() *wire.Request {
		return &wire.Request{Kind: wire.Read, Volume: 1, Chunk: ids.ChunkID(1 + rng.IntN(8)), Block: ids.Block(rng.IntN(1024)), Count: 1, Into: into}
	}}
	l.run(depth)
}

func BenchmarkReadDepth32(b *testing.B) { benchReads(b, 32) }
func BenchmarkReadDepth1(b *testing.B)  { benchReads(b, 1) }
