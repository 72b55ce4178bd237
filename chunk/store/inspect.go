package store

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// Report explains a store's disk to a person, and proves its integrity or says
// what is damaged. Sizes are in blocks of 4 KiB unless they say bytes.
type Report struct {
	ID              string          `json:"id"`
	Cluster         string          `json:"cluster"`
	FormatVersion   int             `json:"formatVersion"`
	Incarnation     uint64          `json:"incarnation"`
	Life            uint32          `json:"life"` // openings so far
	BootID          string          `json:"bootId"`
	SizeBytes       int64           `json:"sizeBytes"`
	SegmentBytes    int64           `json:"segmentBytes"`
	Superblocks     []string        `json:"superblocks"` // "ok", or what is wrong with the copy
	Clean           bool            `json:"cleanlyClosed"`
	LastLSN         uint64          `json:"lastLsn"`
	DurableLSN      uint64          `json:"durableLsn"` // up to here the log has to be whole
	Checkpoints     []CheckpointRef `json:"checkpoints"`
	Segments        []SegmentReport `json:"segments"` // in use, in the order of the log
	FreeSegments    int             `json:"freeSegments"`
	StaleSegments   int             `json:"staleSegments"` // free, of those: with something old in them
	Volumes         []VolumeReport  `json:"volumes"`
	Drops           int             `json:"rememberedDrops"`
	KnownGaps       int             `json:"knownGaps"` // damage that was reported before
	BlocksVerified  uint64          `json:"blocksVerified"`
	BatchesVerified uint64          `json:"batchesVerified"`
	Damage          []string        `json:"damage"` // nothing: the store is whole
}

// CheckpointRef is a checkpoint the log names; its pages are not on this disk.
type CheckpointRef struct {
	From  uint64 `json:"fromLsn"`
	Pages uint64 `json:"pages"`
}

// SegmentReport is one segment in use.
type SegmentReport struct {
	Number  uint32         `json:"number"`
	Gen     uint64         `json:"firstLsn"`
	Last    uint64         `json:"lastLsn"`
	Life    uint32         `json:"life"`
	Used    uint32         `json:"usedBlocks"`
	Live    uint32         `json:"liveBlocks"`
	Marks   uint32         `json:"tombstoneBlocks"` // tombstones, holes and poison that count
	Batches int            `json:"batches"`
	Records map[string]int `json:"records"` // by kind
}

// VolumeReport is what the store holds of one volume.
type VolumeReport struct {
	ID     uint64        `json:"id"`
	Epoch  uint32        `json:"epoch"`
	Floor  string        `json:"floor"`
	High   string        `json:"highestVersion"`
	Intact bool          `json:"intact"` // nothing accepted was lost since the floor
	Live   uint64        `json:"liveBlocks"`
	Chunks []ChunkReport `json:"chunks"`
}

// ChunkReport is one layer of one chunk.
type ChunkReport struct {
	ID     uint64 `json:"id"`
	Layer  uint32 `json:"layer"`
	Data   uint32 `json:"dataBlocks"`
	Zero   uint32 `json:"zeroBlocks"`
	Poison uint32 `json:"poisonBlocks"`
}

const maxDamage = 1000

// Inspect reads everything on a store's disk and changes nothing. progress, if
// set, is told now and then how many of the segments in use are read. An error
// means that the disk holds no store, or one that cannot be opened at all: the
// report then has what is known.
func Inspect(d disk.Disk, progress func(done, of int)) (*Report, error) {
	rep := &Report{FormatVersion: formatVersion, SizeBytes: d.Size(), Checkpoints: []CheckpointRef{}, Segments: []SegmentReport{}, Volumes: []VolumeReport{}, Damage: []string{}}
	p, _, err := readSuper(d)
	rep.superblocks(d)
	if err != nil {
		return rep, err
	}
	rep.ID, rep.Cluster, rep.SegmentBytes = p.ID.String(), p.Cluster, offset(p.segBlocks)
	if err := p.fits(d); err != nil {
		return rep, err
	}
	s := newStore(Config{Disk: readOnly{d}, BootID: "inspection"}, *p)
	c := &course{w: window{d: s.disk}, cut: 1<<64 - 1}
	c.uses = s.findUses(&c.w)
	if err := s.survey(c); err != nil {
		return rep, err
	}
	if err := s.replay(c); err != nil {
		return rep, err
	}
	if c.damage != "" {
		rep.damage("%s: their records are lost", c.damage)
	}
	rep.log(s, c)
	if err := rep.segments(s, c, progress); err != nil {
		return rep, err
	}
	return rep, rep.volumes(s)
}

// readOnly refuses to change the disk below.
type readOnly struct{ disk.Disk }

func (r readOnly) Submit(op *disk.Op) {
	if op.Kind != disk.Read {
		op.Done(status.Errorf(status.Permission, "an inspection does not %s", op.Kind))
		return
	}
	r.Disk.Submit(op)
}

func (r *Report) damage(format string, args ...any) {
	switch n := len(r.Damage); {
	case n < maxDamage:
		r.Damage = append(r.Damage, fmt.Sprintf(format, args...))
	case n == maxDamage:
		r.Damage = append(r.Damage, fmt.Sprintf("more than %d damages: the rest is not listed", maxDamage))
	}
}

// superblocks judges both copies.
func (r *Report) superblocks(d disk.Disk) {
	b := make([]byte, blockBytes)
	for i := range int64(2) {
		err := errors.New("the disk is too small")
		if d.Size() >= 2*blockBytes {
			err = disk.ReadAt(d, b, i*blockBytes)
		}
		if err == nil {
			_, err = decodeSuper(b)
		}
		if err == nil {
			r.Superblocks = append(r.Superblocks, "ok")
			continue
		}
		r.Superblocks = append(r.Superblocks, err.Error())
		r.damage("superblock copy %d: %s", i+1, err)
	}
}

// log tells what recovery has found of the log.
func (r *Report) log(s *Store, c *course) {
	r.Incarnation, r.Life, r.BootID, r.Clean = uint64(s.incarnation), c.life, c.head.boot, c.clean
	r.LastLSN, r.DurableLSN, r.Drops, r.KnownGaps = c.cut-1, c.bound, len(s.drops), len(c.head.gaps)
	for _, root := range c.roots {
		r.Checkpoints = append(r.Checkpoints, CheckpointRef{From: root.from, Pages: root.count})
	}
	for _, g := range s.segs {
		if g.state == segFree {
			r.FreeSegments++
			if g.stale {
				r.StaleSegments++
			}
		}
	}
}

// segments reads every segment in use and holds all of it against its checksums.
func (r *Report) segments(s *Store, c *course, progress func(done, of int)) error {
	for i, u := range c.chain {
		g := u.seg
		sr := SegmentReport{Number: g.n, Gen: g.gen, Last: g.last, Life: g.life, Used: g.tail, Live: g.live, Marks: g.marks, Records: map[string]int{}}
		err := s.scan(&c.w, use{seg: g, gen: u.gen, life: u.life, last: u.last, headed: true}, func(h *batchHead, at uint32, b []byte) error {
			if h.lsn >= c.cut {
				return errDone
			}
			sr.Batches++
			r.BatchesVerified++
			return r.batch(s, c, &sr, g, at, bytes.Clone(b), h)
		})
		if err != nil && err != errDone {
			return err
		}
		r.Segments = append(r.Segments, sr)
		if progress != nil {
			progress(i+1, len(c.chain))
		}
	}
	return nil
}

// batch counts the records of a batch and verifies the data that is in use.
func (r *Report) batch(s *Store, c *course, sr *SegmentReport, g *segment, at uint32, head []byte, h *batchHead) error {
	return eachRecord(head, h, func(rec *record, data uint32) error {
		sr.Records[rec.kind.String()]++
		if rec.kind != kindData {
			return nil
		}
		v := s.vols[ids.VolumeID(rec.volume)]
		for i := range rec.count {
			loc := s.base(g) + at + 1 + data + i
			k := badKey{ids.VolumeID(rec.volume), ids.ChunkID(rec.chunk), ids.LayerID(rec.layer), ids.Block(rec.block + i)}
			if v == nil {
				continue
			}
			ch := v.chunk(k.c, k.l, false)
			if ch == nil {
				continue
			}
			if e, err := s.idx.get(ch, k.b); err != nil || e.loc != loc || e.kind != kindData {
				if err != nil {
					return err
				}
				continue // not in use any more
			}
			b := c.w.block(loc, s.base(g)+s.super.segBlocks)
			switch {
			case b == nil:
				r.damage("volume %d, chunk %d, layer %d, block %d: the disk cannot read it (segment %d)", k.v, k.c, k.l, k.b, g.n)
			case wire.BlockSum(k.v, k.c, k.l, k.b, ids.Version(rec.version), b) != le.Uint32(rec.payload[4*i:]):
				r.damage("volume %d, chunk %d, layer %d, block %d: its checksum is wrong (segment %d)", k.v, k.c, k.l, k.b, g.n)
			default:
				r.BlocksVerified++
			}
		}
		return nil
	})
}

// volumes tells what the index holds.
func (r *Report) volumes(s *Store) error {
	for _, id := range slices.Sorted(maps.Keys(s.vols)) {
		v := s.vols[id]
		vr := VolumeReport{ID: uint64(id), Epoch: uint32(v.epoch), Floor: v.floor.String(), High: v.high.String(), Intact: v.intact, Live: v.live, Chunks: []ChunkReport{}}
		for _, ch := range v.order {
			cr := ChunkReport{ID: uint64(ch.id), Layer: uint32(ch.layer)}
			_, err := s.eachEntry(ch, 0, maxChunkBlocks, 0, func(e wire.Entry) bool {
				switch e.Kind {
				case wire.EntryData:
					cr.Data++
				case wire.EntryZero:
					cr.Zero++
				case wire.EntryPoison:
					cr.Poison++
				}
				return true
			})
			if err != nil {
				return err
			}
			vr.Chunks = append(vr.Chunks, cr)
		}
		slices.SortFunc(vr.Chunks, func(a, b ChunkReport) int {
			return cmp.Or(cmp.Compare(a.ID, b.ID), cmp.Compare(a.Layer, b.Layer))
		})
		r.Volumes = append(r.Volumes, vr)
	}
	return nil
}

// String names the kind as the format's description does.
func (k kind) String() string {
	names := map[kind]string{kindHole: "hole", kindData: "data", kindZero: "zero", kindPoison: "poison", kindDrop: "drop", kindVolume: "volume",
		kindFree: "free", kindClean: "clean", kindHead: "head", kindSegments: "segments", kindVolumes: "volumes", kindDrops: "drops",
		kindGaps: "gaps", kindRoot: "root", kindLayers: "layers", kindLayerTable: "layer table"}
	if n, ok := names[k]; ok {
		return n
	}
	return fmt.Sprintf("kind %d", uint8(k))
}
