package cluster

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/chaos/check"
	"github.com/cairnstore/cairn/proto/status"
)

// batchMagic begins every block of a store's file that is not a guest's
// (docs/DATA.md). A store that lost one cannot know what it lost, and is
// compared with its peers as a whole.
const batchMagic = "CBAT"

// flipBits flips one bit in each of n blocks of what a file really holds; in
// guests' blocks only, or in any.
func flipBits(t *testing.T, name string, rng *rand.Rand, n int, guestsOnly bool) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	blocks := dataBlocks(t, f)
	if len(blocks) < n {
		t.Fatalf("%s holds %d blocks only", name, len(blocks))
	}
	for flipped := 0; flipped < n; {
		at := blocks[rng.IntN(len(blocks))]
		var block [check.BlockBytes]byte
		if _, err := f.ReadAt(block[:], at); err != nil {
			t.Fatal(err)
		}
		if guestsOnly && string(block[:len(batchMagic)]) == batchMagic {
			continue
		}
		bit := rng.IntN(8 * len(block))
		// One byte alone is written: the store may be writing beside it.
		if _, err := f.WriteAt([]byte{block[bit/8] ^ 1<<(bit%8)}, at+int64(bit/8)); err != nil {
			t.Fatal(err)
		}
		flipped++
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// dataBlocks lists where a file has blocks that are no holes, beyond its first
// 64 KiB: a store that cannot tell who it is does not start, which is no matter
// of blocks.
func dataBlocks(t *testing.T, f *os.File) (out []int64) {
	t.Helper()
	for end := int64(16 * check.BlockBytes); ; {
		at, err := unix.Seek(int(f.Fd()), end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		if end, err = unix.Seek(int(f.Fd()), at, unix.SEEK_HOLE); err != nil {
			t.Fatal(err)
		}
		for ; at < end; at += check.BlockBytes {
			out = append(out, at)
		}
	}
}

// holdsMuch tells a store with blocks from one with little but its heads.
func holdsMuch(t *testing.T, name string) bool {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	blocks := dataBlocks(t, f)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return len(blocks) > areaBlocks/2
}

// A store whose disk lies, while it runs and over a restart: with good copies
// elsewhere, the client gets every block right and no error (P6).
func TestFlippedBitsAreNeverServed(t *testing.T) {
	c := startCluster(t)
	l := newLoad(t, startVolume(t, c), 31, 4000)
	rng := rand.New(rand.NewPCG(31, 31))
	store := filepath.Join(c.Dir(), gateway, "store-1")
	for round := range 4 {
		if err := l.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
		if round%2 == 0 {
			flipBits(t, store, rng, 200, false)
		} else {
			if err := c.Down(); err != nil {
				t.Fatal(err)
			}
			flipBits(t, store, rng, 200, false)
			if err := c.Up(t.Context()); err != nil {
				t.Fatal(err)
			}
			l.SetDial(check.NBD(attach(t, c, gateway), nil))
		}
		readAll(t, l)
	}
	waitInSync(t, c)
	readEverywhere(t, c, l)
	linearizable(t, l)
}

// What was read past a bad copy is written back to it: afterwards that copy
// alone gives every block.
func TestBadCopiesAreRepaired(t *testing.T) {
	c := startCluster(t)
	l := newLoad(t, startVolume(t, c), 33, 4000)
	if err := l.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	restart := func(between func()) {
		t.Helper()
		if err := c.Down(); err != nil {
			t.Fatal(err)
		}
		between()
		if err := c.Up(t.Context()); err != nil {
			t.Fatal(err)
		}
		l.SetDial(check.NBD(attach(t, c, gateway), nil))
		readAll(t, l)
	}
	restart(func() {
		flipBits(t, filepath.Join(c.Dir(), gateway, "store-1"), rand.New(rand.NewPCG(33, 33)), 200, true)
	})
	waitInSync(t, c)
	restart(func() {}) // nothing comes from a cache
	for _, name := range []string{"host-2", "host-3"} {
		if err := c.Hold(name); err != nil {
			t.Fatal(err)
		}
		if err := c.Kill(name); err != nil {
			t.Fatal(err)
		}
	}
	readAll(t, l)
	linearizable(t, l)
}

// With no other copy, a bad block is an error: never a wrong block, and never
// the older content that the same store may still hold.
func TestBadOnlyCopyIsAnError(t *testing.T) {
	c := startCluster(t)
	if err := c.CreateVolume(t.Context(), volumeName, volumeBytes, 1); err != nil {
		t.Fatal(err)
	}
	dial := check.NBD(attach(t, c, gateway), nil)
	l := check.NewLoad(check.Config{Dial: dial, Seed: 34, Base: areaBase, Blocks: areaBlocks, Ops: 4000, Log: t.Logf,
		Tolerate: func(err error) bool { return errors.Is(err, status.IO) }})
	if err := l.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	whole := len(readAll(t, l))
	if err := c.Down(); err != nil {
		t.Fatal(err)
	}
	for _, host := range c.Names("host") { // wherever the one copy was placed
		store := filepath.Join(c.Dir(), host, "store-1")
		if holdsMuch(t, store) {
			flipBits(t, store, rand.New(rand.NewPCG(34, 34)), 40, true)
		}
	}
	if err := c.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	l.SetDial(check.NBD(attach(t, c, gateway), nil))
	if left := len(readAll(t, l)); left == whole || left == 0 {
		t.Errorf("%d of %d registers were read after 40 bits were flipped", left, whole)
	}
	if err := l.Run(t.Context()); err != nil { // writes make bad blocks good
		t.Fatal(err)
	}
	linearizable(t, l)
}

// A gateway that was stopped while another took its volume over answers
// nothing any more once it goes on (P4).
func TestTakeoverFencesTheOldGateway(t *testing.T) {
	c := startCluster(t)
	dialOld := check.NBD(startVolume(t, c), nil)
	l := check.NewLoad(check.Config{Dial: dialOld, Seed: 32, Base: areaBase, Blocks: areaBlocks, Ops: 1000, Log: t.Logf})
	if err := l.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	old, err := dialOld(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	paused := make(chan error, 1)
	// Longer than the old lease lasts (8 s), or the takeover would wait for it to
	// come back; shorter than what an NBD server takes for a freeze (10 s), upon
	// which it would not even look at the requests.
	go func() { paused <- c.Pause(gateway, 9500*time.Millisecond) }()
	ctx, cancel := context.WithTimeout(t.Context(), commandMaxWait)
	defer cancel()
	uri, err := c.Cairn(ctx, "volume", "attach", volumeName, "--host", "host-2", "--takeover")
	if err != nil {
		t.Fatal(err)
	}
	l.SetDial(check.NBD(uri[:len(uri)-1], nil))
	if err := l.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	// Invoked now, after the new epoch serves; answered when the old gateway goes on, if at all.
	answered := make(chan error, 2*areaBlocks)
	for b := range int64(areaBlocks) {
		go func() {
			p := make([]byte, check.BlockBytes)
			_, err := old.ReadAt(p, areaBase+b*check.BlockBytes)
			answered <- err
		}()
		if b%64 == 0 {
			go func() {
				_, err := old.WriteAt(make([]byte, check.BlockBytes), areaBase+b*check.BlockBytes)
				answered <- err
			}()
		}
	}
	if err := <-paused; err != nil {
		t.Fatal(err)
	}
	for range areaBlocks + areaBlocks/64 {
		if err := <-answered; err == nil {
			t.Fatal("a gateway that was fenced off answered OK")
		}
	}
	if err := old.Close(); err != nil && !errors.Is(err, check.ErrDisconnected) {
		t.Error(err)
	}
	if err := l.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	waitInSync(t, c)
	readEverywhere(t, c, l)
	linearizable(t, l)
}
