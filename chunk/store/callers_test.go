package store

import (
	"bytes"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/wire"
)

// Several callers at once over a real file that is much smaller than what they
// write, with background work in between; each reads back what it wrote, now
// and after a kill.
func TestManyCallersOverAFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	d, err := disk.Create(path, 32<<20)
	if err != nil {
		t.Fatal(err)
	}
	if err := Make(d, Format{ID: testID, Incarnation: 1, SegmentBytes: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	s := open(t, d, testBoot)
	const callers, blocks, rounds = 4, 200, 12
	var wg sync.WaitGroup
	errs := make(chan error, callers)
	for c := range ids.ChunkID(callers) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			errs <- overwrite(s, c+1, blocks, rounds)
		}()
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for now := time.Duration(0); ; now += time.Second {
			select {
			case <-stop:
				return
			default:
				s.Step(now)
				s.Usage()
				s.Volumes()
			}
		}
	}()
	wg.Wait()
	close(stop)
	<-stopped
	for range callers {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Close(); err != nil { // the store is left as a kill leaves it
		t.Fatal(err)
	}
	if d, err = disk.Open(path); err != nil {
		t.Fatal(err)
	}
	s = open(t, d, testBoot)
	for c := range ids.ChunkID(callers) {
		if err := expect(s, c+1, blocks, rounds-1); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

func overwrite(s *Store, c ids.ChunkID, blocks, rounds int) error {
	for round := range rounds {
		for b := 0; b < blocks; b += 10 {
			if r := ask(s, put(c, ids.Block(b), 10, ids.MakeVersion(1, uint64(round+1)), uint64(round*1000+b))); r.Status != 0 {
				return r.Err()
			}
			if b%50 == 0 {
				if r := ask(s, wire.Request{Kind: wire.Flush, Volume: 1}); r.Status != 0 {
					return r.Err()
				}
			}
		}
		if err := expect(s, c, blocks, round); err != nil {
			return err
		}
	}
	return nil
}

func expect(s *Store, c ids.ChunkID, blocks, round int) error {
	r := ask(s, readOf(c, 0, uint32(blocks), 0))
	if r.Status != 0 {
		return r.Err()
	}
	for b := range blocks {
		if !bytes.Equal(r.Data[b*blockBytes:(b+1)*blockBytes], blockOf(uint64(round*1000+b))) {
			return fmt.Errorf("chunk %d block %d is not that of round %d", c, b, round)
		}
	}
	return nil
}
