package store

import (
	"testing"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/wire"
)

// lastWay notes how the last write went.
type lastWay struct {
	disk.Disk
	direct bool
}

func (d *lastWay) Submit(op *disk.Op) {
	if op.Kind == disk.Write {
		d.direct = op.Direct
	}
	d.Disk.Submit(op)
}

// After two segments of a load the third is written the way that suits it:
// around the page cache what is large or flushed at once, else through it.
func TestTheWayFollowsTheLoad(t *testing.T) {
	const seg = 4 << 20
	for _, l := range []struct {
		blocks        int
		flush, direct bool
	}{{1, false, false}, {1, true, true}, {32, false, false}, {wire.MaxIO, false, true}} {
		d := &lastWay{Disk: disk.NewMem(logStart*blockBytes + 20*seg)}
		if err := Make(d, Format{ID: testID, Incarnation: 1, SegmentBytes: seg}); err != nil {
			t.Fatal(err)
		}
		s := open(t, d, testBoot)
		for i, sent := 0, 0; sent < 2*seg/blockBytes+seg/blockBytes/2; i, sent = i+1, sent+l.blocks {
			mustOK(t, ask(s, put(1, ids.Block(i%4*l.blocks), l.blocks, ids.MakeVersion(1, uint64(i+1)), 1)))
			if l.flush {
				mustOK(t, ask(s, wire.Request{Kind: wire.Flush, Volume: 1}))
			}
		}
		if d.direct != l.direct {
			t.Errorf("%d blocks at a time, flushed at once %v: around the page cache %v", l.blocks, l.flush, d.direct)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
