package gateway

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// Shrink cuts a volume's end off. It lowers the limit, waits until what was
// under way beyond it is done, looks at the tail, and commits; until it knows
// that the commit did not happen, the limit stays.
//
// The look is at the data, not at the map: blocks of zeros are nothing, whether
// they were written or not.

const (
	tailRead   = 1 << 20              // bytes of one read
	tailRanges = 8                    // named in a refusal
	drainPoll  = 2 * time.Millisecond // while operations beyond the limit finish
)

// ShrinkRequest asks for a smaller volume.
type ShrinkRequest struct {
	Bytes       uint64
	DiscardTail bool // cut data off; at a chunk's border
	KeepSeconds int64
}

// Shrink makes a volume that is attached here smaller, or says why not:
// status.Conflict names what is written beyond the new end.
func (g *Gateway) Shrink(ctx context.Context, name string, r ShrinkRequest) error {
	v, err := g.Volume(name)
	if err != nil {
		return err
	}
	if r.Bytes == 0 || r.Bytes%ids.BlockSize != 0 || r.Bytes >= v.Size() {
		return status.Errorf(status.Invalid, "volume %s has %d bytes: a smaller size is a multiple of %d below that", name, v.Size(), ids.BlockSize)
	}
	v.shrinking.Lock()
	defer v.shrinking.Unlock()
	v.step(&volume.Limit{Bytes: r.Bytes})
	err = v.shrink(ctx, r)
	switch {
	case err == nil:
		g.log.Info("volume shrunk", "volume", name, "bytes", r.Bytes)
	case status.Of(err) != status.Unknown:
		v.step(&volume.Limit{})
	}
	return err
}

func (v *Volume) shrink(ctx context.Context, r ShrinkRequest) error {
	if err := v.drainBeyond(ctx, r.Bytes); err != nil {
		return err
	}
	if !r.DiscardTail {
		if err := v.tailIsEmpty(ctx, r.Bytes); err != nil {
			return err
		}
	}
	_, err := v.g.cfg.Meta.Do(ctx, &pb.Command{Op: &pb.Command_ShrinkVolume{ShrinkVolume: &pb.ShrinkVolume{
		VolumeId: uint64(v.id), Epoch: uint32(v.epoch), SizeBytes: r.Bytes, DiscardTail: r.DiscardTail, KeepSeconds: r.KeepSeconds}}})
	if err != nil {
		return err
	}
	if err := v.refresh(ctx); err != nil { // the watch brings it later, and until then the limit holds
		v.g.log.Warn("volume not read again after a shrink", "volume", v.name, "err", err)
	}
	return nil
}

// drainBeyond waits for operations that were admitted before the limit.
func (v *Volume) drainBeyond(ctx context.Context, bytes uint64) error {
	t := time.NewTicker(drainPoll)
	defer t.Stop()
	for {
		v.mu.Lock()
		n := v.engine.Beyond(bytes)
		v.mu.Unlock()
		if n == 0 {
			return nil
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return status.Errorf(status.Timeout, "volume %s is not shrunk: %d operations beyond %d bytes are still under way; ask again", v.name, n, bytes)
		}
	}
}

// extent is [off, end) bytes.
type extent struct{ off, end uint64 }

// tailIsEmpty reads everything allocated from a place on.
func (v *Volume) tailIsEmpty(ctx context.Context, from uint64) error {
	var found []extent
	var written uint64
	buf, zero := make([]byte, tailRead), make([]byte, ids.BlockSize)
	off := from
	for _, x := range v.Extents(from, v.Size()-from) {
		end := off + x.Len
		for ; off < end && !x.Hole; off += uint64(len(buf)) {
			buf = buf[:min(tailRead, end-off)]
			if err := v.readTail(ctx, off, buf); err != nil {
				return err
			}
			for b := 0; b < len(buf); b += ids.BlockSize {
				if bytes.Equal(buf[b:b+ids.BlockSize], zero) {
					continue
				}
				written += ids.BlockSize
				at := off + uint64(b)
				if n := len(found); n > 0 && found[n-1].end == at {
					found[n-1].end += ids.BlockSize
				} else if n < tailRanges {
					found = append(found, extent{at, at + ids.BlockSize})
				}
			}
		}
		off = end
	}
	if written == 0 {
		return nil
	}
	var parts []string
	named := uint64(0)
	for _, x := range found {
		parts = append(parts, fmt.Sprintf("%d-%d", x.off, x.end))
		named += x.end - x.off
	}
	more := ""
	if named < written {
		more = " and more"
	}
	return status.Errorf(status.Conflict, "volume %s is not shrunk to %d bytes: %d bytes of data lie beyond, at %s%s; make the file system on it smaller and discard the rest (fstrim, blkdiscard), or cut it off with --discard-tail", v.name, from, written, strings.Join(parts, ", "), more)
}

func (v *Volume) readTail(ctx context.Context, off uint64, buf []byte) error {
	w := make(waiter, 1)
	v.Submit([]*volume.Op{{Kind: volume.OpRead, Tail: true, Off: off, Len: uint64(len(buf)), Data: buf, User: w}})
	select {
	case k := <-w:
		if k != status.OK {
			return status.Errorf(k, "volume %s is not shrunk: what lies at %d cannot be read (%s)", v.name, off, k)
		}
		return nil
	case <-ctx.Done():
		return status.Errorf(status.Timeout, "volume %s is not shrunk: reading what lies beyond takes too long; ask again", v.name)
	}
}
