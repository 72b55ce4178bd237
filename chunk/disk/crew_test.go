package disk

import (
	"bytes"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
)

// seenKernel notes which goroutine makes each transfer and sync.
type seenKernel struct {
	linux
	mu   sync.Mutex
	seen map[string]int
}

func (k *seenKernel) note() {
	b := make([]byte, 64)
	b = b[:runtime.Stack(b, false)]
	who, _, _ := bytes.Cut(b, []byte(" ["))
	k.mu.Lock()
	k.seen[string(who)]++
	k.mu.Unlock()
}

func (k *seenKernel) write(fd int, b [][]byte, off int64) (int, error) {
	k.note()
	return k.linux.write(fd, b, off)
}
func (k *seenKernel) fdatasync(fd int) error { k.note(); return k.linux.fdatasync(fd) }

// A write whose Done submits a sync, whose Done submits the next write, and so
// on, keeps one goroutine busy and wakes no other.
func TestASyncBehindAWriteWakesNobody(t *testing.T) {
	k := &seenKernel{seen: map[string]int{}}
	d, err := create(k, filepath.Join(t.TempDir(), "store"), 1<<20)
	must(t, err)
	left, end := 100, make(chan error)
	var next func(error)
	next = func(err error) {
		if left--; err != nil || left < 0 {
			end <- err
			return
		}
		op := &Op{Kind: Sync, Done: next}
		if left%2 == 1 {
			op = &Op{Kind: Write, Bufs: [][]byte{{1}}, Done: next}
		}
		d.Submit(op)
	}
	next(nil)
	must(t, <-end, d.Close())
	if len(k.seen) != 1 {
		t.Fatalf("more than one goroutine had part in it: %v", k.seen)
	}
}

// What is large does not wait for a Done that takes long; what is small may,
// and comes once the Done is back.
func TestALargeWriteDoesNotWaitForADone(t *testing.T) {
	d, err := Create(filepath.Join(t.TempDir(), "store"), 1<<20)
	must(t, err)
	in, release, small := make(chan bool), make(chan bool), make(chan error, 1)
	d.Submit(&Op{Kind: Write, Bufs: [][]byte{{1}}, Done: func(error) { in <- true; <-release }})
	<-in
	must(t, do(d, &Op{Kind: Write, Bufs: [][]byte{make([]byte, largeBytes)}})) // would not come back
	d.Submit(&Op{Kind: Write, Bufs: [][]byte{{1}}, Done: func(err error) { small <- err }})
	close(release)
	must(t, <-small, d.Close())
}

// Whatever is submitted, from Dones and from elsewhere, is answered once: no
// crew sleeps while it has work.
func TestNoCrewSleepsOverWork(t *testing.T) {
	d, err := Create(filepath.Join(t.TempDir(), "store"), 1<<20)
	must(t, err)
	var left sync.WaitGroup
	var answers atomic.Int64
	const begun, links = 64, 50
	left.Add(begun)
	for i := range begun {
		rng := rand.New(rand.NewPCG(1, uint64(i))) // used by one link at a time
		n := links
		var next func(error)
		next = func(err error) {
			if err != nil {
				t.Error(err)
			}
			answers.Add(1)
			if n--; n == 0 {
				left.Done()
				return
			}
			op := &Op{Kind: Kind(rng.IntN(int(kinds))), Done: next}
			switch op.Kind {
			case Read, Write:
				size := 512
				if rng.IntN(4) == 0 {
					size = largeBytes
				}
				op.Bufs = [][]byte{make([]byte, size)}
			case Discard, Allocate:
				op.Len = Align
			}
			d.Submit(op)
		}
		go next(nil)
	}
	left.Wait()
	must(t, d.Close())
	if n := answers.Load(); n != begun*links {
		t.Fatalf("%d answers of %d", n, begun*links)
	}
}
