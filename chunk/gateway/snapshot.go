package gateway

import (
	"context"
	"time"

	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// A snapshot is a cut of one volume, or of several at one moment, perhaps on
// several hosts: Prepare each, Hold each, Release each, and name them all in one
// entry of metadata if each was held until its release.

const (
	// maxHold bounds how long writes are held for the other volumes of a group.
	maxHold = 5 * time.Second
	// cutWait is how long one volume's cut alone may take.
	cutWait = 2 * time.Second
	// A volume is flushed before its cut until that is quick: what the cut has to
	// flush while writes wait is what came during the last one. On a disk that is
	// never quick the cut is made all the same.
	settleQuick = 20 * time.Millisecond
	settleMost  = 5
)

// heldCut is a cut between Hold and Release.
type heldCut struct {
	ev   *volume.Cut
	news chan volume.CutNews
}

// Cut says what a snapshot shows.
type Cut struct {
	Volume ids.VolumeID
	Layer  ids.LayerID
	Size   uint64        // bytes
	Held   bool          // until now, without a break
	For    time.Duration // writes were held for so long
}

// PrepareCut gets a volume's next layer and flushes the volume while it runs. The
// layer comes first: what is written while metadata answers is flushed too, and every
// flush costs the writes beside it some of the disk.
func (g *Gateway) PrepareCut(ctx context.Context, name string) error {
	v, err := g.Volume(name)
	if err != nil {
		return err
	}
	if v.State() != volume.Serving { // a flush waits until it does, or says why it does not
		if err := v.settle(ctx); err != nil {
			return err
		}
	}
	v.mu.Lock()
	top := v.engine.Top()
	v.mu.Unlock()
	res, err := g.cfg.Meta.Do(ctx, &pb.Command{Op: &pb.Command_PrepareSnapshot{PrepareSnapshot: &pb.PrepareSnapshot{
		VolumeId: uint64(v.id), Epoch: uint32(v.epoch), Current: uint32(top)}}})
	if err != nil {
		return err
	}
	v.mu.Lock()
	v.prepared = res.Volume
	v.mu.Unlock()
	for range settleMost {
		began := now()
		if err := v.settle(ctx); err != nil || now()-began < settleQuick {
			return err
		}
	}
	return nil
}

// HoldCut holds a volume's new writes back and answers when all that was written
// before is durable. hold 0 lets them go at once; else ReleaseCut does, or the
// time.
func (g *Gateway) HoldCut(ctx context.Context, name string, hold time.Duration) (*Cut, error) {
	v, err := g.Volume(name)
	if err != nil {
		return nil, err
	}
	alone := hold == 0
	if alone {
		hold = cutWait
	}
	h := &heldCut{news: make(chan volume.CutNews, 2)}
	v.mu.Lock()
	prepared := v.prepared
	v.prepared = nil
	h.ev = &volume.Cut{Volume: prepared, Until: now() + min(hold, maxHold)}
	if prepared != nil {
		v.cuts[h.ev] = h.news
		v.held = h
	}
	v.mu.Unlock()
	if prepared == nil {
		return nil, status.Errorf(status.Conflict, "volume %s has no cut prepared, or another one is under way", name)
	}
	v.step(h.ev)
	n, err := v.awaitCut(ctx, h)
	if err != nil {
		return nil, err
	}
	if n.State != volume.CutHeld {
		return nil, status.Errorf(status.Unavailable, "no snapshot of volume %s: %s", name, n.Why)
	}
	c := &Cut{Volume: v.id, Layer: n.Layer, Size: n.Size}
	if !alone {
		return c, nil
	}
	r, err := v.releaseCut(ctx, h)
	if err != nil {
		return nil, err
	}
	// One volume alone is cut at one moment however its hold ended.
	c.Held, c.For = true, r.For
	return c, nil
}

// ReleaseCut lets the writes go that HoldCut held.
func (g *Gateway) ReleaseCut(ctx context.Context, name string) (*Cut, error) {
	v, err := g.Volume(name)
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	h := v.held
	v.held = nil
	v.mu.Unlock()
	if h == nil {
		return &Cut{Volume: v.id}, nil
	}
	n, err := v.releaseCut(ctx, h)
	if err != nil {
		return nil, err
	}
	return &Cut{Volume: v.id, Held: n.State == volume.CutReleased && !n.Late, For: n.For}, nil
}

func (v *Volume) releaseCut(ctx context.Context, h *heldCut) (volume.CutNews, error) {
	v.step(&volume.Release{Cut: h.ev})
	return v.awaitCut(ctx, h)
}

func (v *Volume) awaitCut(ctx context.Context, h *heldCut) (volume.CutNews, error) {
	select {
	case n := <-h.news:
		return n, nil
	case <-ctx.Done():
		v.step(&volume.Release{Cut: h.ev})
		return volume.CutNews{}, status.Errorf(status.Timeout, "the cut of volume %s takes too long: its writes go on, and there is no snapshot", v.name)
	}
}

// cutNews hands an engine's news of a cut to whoever asked for it. A cut brings
// two at most, and the channel has room for them.
func (v *Volume) cutNews(n volume.CutNews) {
	v.mu.Lock()
	c := v.cuts[n.Cut]
	if n.State != volume.CutHeld {
		delete(v.cuts, n.Cut)
	}
	v.mu.Unlock()
	if c != nil {
		c <- n
	}
}

// Reclaim waits until no layer of a volume waits to be merged.
func (g *Gateway) Reclaim(ctx context.Context, name string) error {
	v, err := g.Volume(name)
	if err != nil {
		return err
	}
	if err := v.refresh(ctx); err != nil {
		return err
	}
	t := time.NewTicker(20 * time.Millisecond)
	defer t.Stop()
	for {
		in := v.Info()
		switch {
		case in.State != volume.Serving:
			return status.Errorf(status.Unavailable, "volume %s is %s: %s", name, in.State, in.Why)
		case !in.Merging:
			return nil
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			why := in.MergeWhy
			if why == "" {
				why = "all replicas must be in sync for it"
			}
			return status.Errorf(status.Timeout, "layers of volume %s are still being merged: %s", name, why)
		}
	}
}
