package store

import (
	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/proto/status"
)

// The way of growing, for a store that nobody has open and whose disk became
// larger:
//
//  1. The first blocks of the new segments are emptied: what an earlier owner of
//     the disk left there is no head of ours. A sync.
//  2. The first superblock counts the new segments. A sync.
//  3. The second one does. A sync.
//
// Crash points: before the end of 2 the store is what it was (a torn first copy
// is a damaged one, and the second counts); from then on the copies differ, the
// larger one counts, and the next opening makes them equal before it uses any
// new segment. So no log ever names a segment that a copy does not know. A copy
// that is found damaged is written anew before the other one is touched.

// Growable says why the store on d could not use size bytes: Invalid when that
// is no room for another segment, TooBig when there were more of them than a
// segment's head can list.
func Growable(d disk.Disk, size int64) error {
	_, _, _, err := growth(d, size)
	return err
}

// growth returns the superblock of the store on d, the one it has on size bytes,
// and the copy that is to be written anew first (readSuper).
func growth(d disk.Disk, size int64) (p *super, q super, bad int64, err error) {
	if p, bad, err = readSuper(d); err == nil {
		err = p.fits(d)
	}
	if err != nil {
		return nil, q, bad, err
	}
	q = *p
	blocks := size/blockBytes - logStart
	if blocks > 1<<32-1-logStart {
		return nil, q, bad, status.Errorf(status.TooBig, "a store of %d bytes is over the limit of 16 TiB", size)
	}
	if q.segments = uint32(max(blocks, 0) / int64(p.segBlocks)); q.segments <= p.segments {
		return nil, q, bad, status.Errorf(status.Invalid, "%d bytes are no room for another segment of %d: the store has %d of them already", size, offset(p.segBlocks), p.segments)
	}
	if !q.listable() {
		return nil, q, bad, status.Errorf(status.TooBig, "a store with segments of %d bytes cannot use %d bytes: make another store there, and retire this one", offset(p.segBlocks), size)
	}
	return p, q, bad, nil
}

// Grow lets a store use all of d, which has become larger; it returns what the
// store's segments take up, in bytes, before and after. Errors as of Growable.
func Grow(d disk.Disk) (before, after int64, err error) {
	p, q, bad, err := growth(d, d.Size())
	if err != nil {
		return 0, 0, err
	}
	before = int64(p.segments) * int64(p.segBlocks) * blockBytes
	if bad >= 0 {
		if err := p.write(d, bad); err != nil {
			return before, before, err
		}
	}
	for n := p.segments; n < q.segments; n++ {
		if err := disk.WriteAt(d, zeros[:2*blockBytes], offset(logStart+n*p.segBlocks)); err != nil {
			return before, before, status.Errorf(status.IO, "empty the new segments: %w", err)
		}
	}
	if err := disk.SyncAll(d); err != nil {
		return before, before, status.Errorf(status.IO, "sync the new segments: %w", err)
	}
	for copy := range int64(2) {
		if err := q.write(d, copy); err != nil {
			return before, before, err
		}
	}
	return before, int64(q.segments) * int64(q.segBlocks) * blockBytes, nil
}

// listable reports whether the head of a segment can list all the others and
// leave the larger part of it to data.
func (p *super) listable() bool {
	const perBatch = (batchRoom - recordFixed) / tableEntry
	return p.segments/perBatch+4 <= p.segBlocks/4
}

// fits says why a superblock is not that of the disk it was read from.
func (p *super) fits(d disk.Disk) error {
	need := (logStart + int64(p.segments)*int64(p.segBlocks)) * blockBytes
	if p.segBlocks < minSegBlocks || p.segBlocks > maxSegBlocks || p.segments < minSegments || need > d.Size() {
		return status.Errorf(status.Corrupt, "store %s needs a disk of %d bytes and finds %d: it was cut", p.ID, need, d.Size())
	}
	return nil
}

// write writes one copy, durably. The other one has to be good.
func (p *super) write(d disk.Disk, copy int64) error {
	if err := disk.WriteAt(d, p.encode(), copy*blockBytes); err != nil {
		return status.Errorf(status.IO, "write the superblock: %w", err)
	}
	if err := disk.SyncAll(d); err != nil {
		return status.Errorf(status.IO, "sync the superblock: %w", err)
	}
	return nil
}
