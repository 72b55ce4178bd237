package gateway

import (
	"context"
	"fmt"
	"sort"
	"strings"

	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

const (
	// maxShown bounds the snapshots that are looked at through one gateway.
	maxShown = 64
	// copyBytes and copyDepth are the operations of a flattening.
	copyBytes = 1 << 20
	copyDepth = 4
)

// origins reads what a clone reads through; nil for a volume that is none.
func (g *Gateway) origins(ctx context.Context, v *pb.Volume) ([]*pb.OriginState, error) {
	if v.Origin == nil {
		return nil, nil
	}
	rep, err := g.cfg.Meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Volume{Volume: fmt.Sprintf("id:%d", v.Id)}, WithOrigins: true})
	if err != nil {
		return nil, err
	}
	return rep.Origins, nil
}

// lookAgain brings an engine everything it may ask for: the volume, what it is a
// clone of, or where the snapshot it shows lies now; call asks, nil: a change.
func (v *Volume) lookAgain(ctx context.Context, call *volume.MetaCall) error {
	if v.snapshot == "" {
		if err := v.refresh(ctx); err != nil {
			return err
		}
		rep, err := v.g.cfg.Meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Volume{Volume: fmt.Sprintf("id:%d", v.id)}, WithOrigins: true})
		if err == nil && len(rep.Origins) > 0 {
			v.step(&volume.Origins{States: rep.Origins, Call: call})
		}
		return err
	}
	_, states, err := v.g.snapshotState(ctx, fmt.Sprintf("id:%d", v.id), v.snapshot)
	switch status.Of(err) {
	case status.OK:
		v.step(&volume.Origins{States: states, Call: call})
	case status.NotFound:
		v.step(&volume.Fence{Why: err.Error()})
		return nil
	}
	return err
}

// snapshotState reads where a snapshot lies.
func (g *Gateway) snapshotState(ctx context.Context, name, snapshot string) (*pb.Volume, []*pb.OriginState, error) {
	rep, err := g.cfg.Meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Volume{Volume: name}, WithChunks: true, WithOrigins: true})
	if err != nil {
		return nil, nil, err
	}
	if len(rep.Volumes) != 1 {
		return nil, nil, status.Errorf(status.NotFound, "there is no volume %q: `cairn volume ls` lists them", name)
	}
	v := rep.Volumes[0]
	for _, l := range v.Layers {
		if l.State == pb.LayerState_LAYER_STATE_SNAPSHOT && l.Name == snapshot {
			return v, append([]*pb.OriginState{{Volume: v, Layer: l.Id, SizeBytes: l.SizeBytes, Chunks: rep.Chunks}}, rep.Origins...), nil
		}
	}
	return nil, nil, status.Errorf(status.NotFound, "volume %s has no snapshot %q: `cairn volume snapshot ls %s` lists them", v.Name, snapshot, v.Name)
}

// Show returns a read-only view of a snapshot, VOLUME@SNAPSHOT. Any gateway can
// show any snapshot: nothing is attached for it.
func (g *Gateway) Show(ctx context.Context, name string) (*Volume, error) {
	g.mu.Lock()
	v, n, closed := g.shown[name], len(g.shown), g.closed
	g.mu.Unlock()
	switch {
	case closed:
		return nil, status.Errorf(status.Shutdown, "host %s is going away", g.cfg.Host)
	case v != nil && v.State() != volume.Ended:
		return v, nil
	case v == nil && n >= maxShown:
		return nil, status.Errorf(status.TooBig, "host %s already shows %d snapshots: `cairn volume detach VOLUME@SNAPSHOT` lets one go", g.cfg.Host, n)
	}
	base, snapshot, _ := strings.Cut(name, "@")
	of, states, err := g.snapshotState(ctx, base, snapshot)
	if err != nil {
		return nil, err
	}
	face := &pb.Volume{Id: of.Id, Name: name, SizeBytes: states[0].SizeBytes, ChunkBytes: of.ChunkBytes}
	fresh, err := newVolume(g, face, volume.Config{Origins: states, ReadOnly: true}, snapshot)
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	old := g.shown[name]
	if old != nil && old.State() != volume.Ended || g.closed { // somebody was faster, or it is too late
		g.mu.Unlock()
		fresh.close()
		return g.Show(ctx, name)
	}
	g.shown[name] = fresh
	g.mu.Unlock()
	if old != nil {
		old.close()
	}
	return fresh, nil
}

// Shown returns the snapshots that are looked at, by name.
func (g *Gateway) Shown() []*Volume {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := make([]*Volume, 0, len(g.shown))
	for _, v := range g.shown {
		out = append(out, v)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].name < out[j].name })
	return out
}

// Hide ends the view of a snapshot; status.NotFound if there is none.
func (g *Gateway) Hide(name string) error {
	g.mu.Lock()
	v := g.shown[name]
	g.mu.Unlock()
	if v == nil {
		return status.Errorf(status.NotFound, "host %s shows no snapshot %s", g.cfg.Host, name)
	}
	g.hide(v)
	return nil
}

func (g *Gateway) hide(v *Volume) {
	if g.cfg.Gone != nil {
		g.cfg.Gone(v.name)
	}
	g.mu.Lock()
	if g.shown[v.name] == v {
		delete(g.shown, v.name)
	}
	g.mu.Unlock()
	v.close()
}

// Flatten copies everything a clone shows from its origin into the clone, and
// lets go of the origin. It may be cut short and begun again: what is copied
// stays.
func (g *Gateway) Flatten(ctx context.Context, name string) error {
	v, err := g.Volume(name)
	if err != nil {
		return err
	}
	v.mu.Lock()
	todo, size := v.engine.OriginChunks(), v.engine.Size()
	v.mu.Unlock()
	slots := make(chan error, copyDepth)
	for range copyDepth {
		slots <- nil
	}
	for _, i := range todo {
		begin := uint64(i) * v.chunkBytes
		for off := begin; off < min(begin+v.chunkBytes, size); off += copyBytes {
			if err := <-slots; err != nil {
				return err
			}
			n := min(copyBytes, begin+v.chunkBytes-off, size-off)
			go func() { slots <- v.copyUp(ctx, off, n) }()
		}
	}
	for range copyDepth {
		if err := <-slots; err != nil {
			return err
		}
	}
	if err := v.settle(ctx); err != nil {
		return err
	}
	_, err = g.cfg.Meta.Do(ctx, &pb.Command{Op: &pb.Command_FlattenVolume{FlattenVolume: &pb.FlattenVolume{VolumeId: uint64(v.id), Epoch: uint32(v.epoch)}}})
	if err != nil {
		return err
	}
	return v.refresh(ctx)
}

// copyUp makes a range the clone's own.
func (v *Volume) copyUp(ctx context.Context, off, n uint64) error {
	w := make(waiter, 1)
	v.Submit([]*volume.Op{{Kind: volume.OpCopy, Off: off, Len: n, User: w}})
	select {
	case k := <-w:
		if k != status.OK {
			return status.Errorf(k, "clone %s is not flattened: its bytes from %d on cannot be copied (%s)", v.name, off, k)
		}
		return nil
	case <-ctx.Done():
		return status.Errorf(status.Timeout, "clone %s is not flattened yet: begin again, what is copied stays", v.name)
	}
}
