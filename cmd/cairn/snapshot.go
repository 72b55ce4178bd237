package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

const (
	// groupHold bounds how long the writes of a group wait for its last volume.
	groupHold = 3 * time.Second
	// reclaimWait is for merging what a deleted snapshot held.
	reclaimWait = 24 * time.Hour
)

func volumeSnapshot(c *cli) *cobra.Command {
	var name string
	var out outputFlag
	create := func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return usagef("name the volumes to take a snapshot of: see `%s --help`", cmd.CommandPath())
		}
		if err := out.check(); err != nil {
			return err
		}
		return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
			if name == "" {
				name = time.Now().UTC().Format("s-20060102-150405")
			}
			return s.snapshot(ctx, name, args, &out)
		})
	}
	cmd := &cobra.Command{
		Use:   "snapshot VOLUME…",
		Short: "Take a snapshot of a volume, or of several at one moment",
		Long: `Take a snapshot of a volume, or of several volumes at one moment. A volume in use goes
on; its writes wait for a flush. Nothing is copied. The snapshot is VOLUME@NAME: it can
be read (cairn volume attach VOLUME@NAME), cloned, rolled back to, exported and compared.`,
		Example: "  cairn volume snapshot db --name monday\n  cairn volume snapshot db-data db-log --name before-upgrade\n  cairn volume snapshot ls db",
		Args:    cobra.ArbitraryArgs,
		RunE:    create,
	}
	sub := &cobra.Command{Use: "create VOLUME…", Short: "The same, whatever the volumes are called", Args: cobra.MinimumNArgs(1), RunE: create,
		Example: "  cairn volume snapshot create db --name monday"}
	for _, x := range []*cobra.Command{cmd, sub} {
		x.Flags().StringVar(&name, "name", "", "name of the snapshot (default: the time)")
		out.register(x)
	}
	cmd.AddCommand(sub, snapshotList(c), snapshotRemove(c))
	return cmd
}

// splitSnapshot cuts VOLUME@SNAPSHOT; the second is empty for a volume alone.
func splitSnapshot(s string) (volume, snapshot string) {
	volume, snapshot, _ = strings.Cut(s, "@")
	return volume, snapshot
}

// wantSnapshot is splitSnapshot where a snapshot must be named.
func wantSnapshot(s string) (volume, snapshot string, err error) {
	if volume, snapshot = splitSnapshot(s); volume == "" || snapshot == "" {
		return "", "", usagef("%q does not name a snapshot: write VOLUME@SNAPSHOT", s)
	}
	return volume, snapshot, nil
}

// member is one volume of a group that is being cut.
type groupMember struct {
	volume, host string
	attached     bool             // by us, for this
	conn         *grpc.ClientConn // to the host: writes held wait for no new one
	cut          *pb.Cut
}

// takenView is a snapshot that was taken, as `-o json` shows it.
type takenView struct {
	Snapshots []string `json:"snapshots"` // VOLUME@NAME each
	FlushedMs float64  `json:"flushedMs"` // before the cut, while writes went on
	CutMs     float64  `json:"cutMs"`     // from there until the snapshot had its name
	HeldMs    float64  `json:"heldMs"`    // of this a write waited at most
}

func (s *session) snapshot(ctx context.Context, name string, volumes []string, out *outputFlag) error {
	v, err := s.takeSnapshot(ctx, name, volumes)
	if err != nil {
		return err
	}
	if out.format != "table" {
		return out.show(v, nil, nil)
	}
	for _, taken := range v.Snapshots {
		fmt.Println(taken)
	}
	say("flushed for %.1f ms while writes went on, cut in %.1f ms; writes were held for %.1f ms at most", v.FlushedMs, v.CutMs, v.HeldMs)
	return nil
}

// takeSnapshot cuts volumes and names the cuts in one entry. Volumes nobody has
// attached are attached for it.
func (s *session) takeSnapshot(ctx context.Context, name string, volumes []string) (taken *takenView, err error) {
	if slices.Sort(volumes); len(slices.Compact(slices.Clone(volumes))) != len(volumes) {
		return nil, usagef("a volume is named twice")
	}
	var group []*groupMember
	defer func() {
		for _, m := range group {
			if !m.attached {
				continue
			}
			if derr := s.detach(context.WithoutCancel(ctx), m.volume); derr != nil {
				err = errors.Join(err, fmt.Errorf("volume %s was attached for its snapshot and still is: %w", m.volume, derr))
			}
		}
	}()
	taken = &takenView{}
	for _, n := range volumes {
		m := &groupMember{volume: n}
		v, err := s.volume(ctx, n)
		if err != nil {
			return nil, err
		}
		if v.HolderHost == "" {
			if _, err := s.attach(ctx, n, "", false); err != nil {
				return nil, err
			}
			if v, err = s.volume(ctx, n); err != nil {
				return nil, err
			}
			m.attached = true
		}
		m.host = v.HolderHost
		group = append(group, m)
		taken.Snapshots = append(taken.Snapshots, n+"@"+name)
	}
	op := &pb.NameSnapshots{Name: name}
	began, cut, held, err := s.cutGroup(ctx, group)
	for _, m := range group {
		op.Cuts = append(op.Cuts, m.cut)
	}
	if err == nil {
		_, err = s.meta.Do(ctx, &pb.Command{Op: &pb.Command_NameSnapshots{NameSnapshots: op}})
	}
	if err != nil {
		return nil, errors.Join(err, s.giveUp(ctx, group))
	}
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	taken.FlushedMs, taken.CutMs, taken.HeldMs = ms(cut.Sub(began)), ms(time.Since(cut)), ms(held)
	return taken, nil
}

// giveUp lets go of what was cut for nothing.
func (s *session) giveUp(ctx context.Context, group []*groupMember) error {
	op := &pb.NameSnapshots{GiveUp: true}
	for _, m := range group {
		if m.cut != nil {
			op.Cuts = append(op.Cuts, m.cut)
		}
	}
	if len(op.Cuts) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cliWait)
	defer cancel()
	_, err := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_NameSnapshots{NameSnapshots: op}})
	return err
}

// cutGroup prepares, holds and releases; it returns when it began to prepare and
// to hold, and the longest hold.
func (s *session) cutGroup(ctx context.Context, group []*groupMember) (began, cut time.Time, longest time.Duration, err error) {
	hosts, err := s.hosts(ctx)
	if err != nil {
		return began, cut, 0, err
	}
	addr := map[string]*pb.Host{}
	for _, h := range hosts {
		addr[h.Host.Name] = h.Host
	}
	for _, m := range group {
		h := addr[m.host]
		if h == nil {
			return began, cut, 0, status.Errorf(status.NotFound, "there is no host %q: `cairn host ls` lists them", m.host)
		}
		if m.conn, err = dialHost(h); err != nil {
			return began, cut, 0, err
		}
		defer func() { err = errors.Join(err, m.conn.Close()) }()
	}
	call := func(m *groupMember, ask func(context.Context, pb.HostControlClient) (*pb.CutReply, error)) (*pb.CutReply, error) {
		rep, err := askHost(ctx, addr[m.host], m.conn, ask)
		if err != nil {
			return nil, err
		}
		return rep, status.New(status.Kind(rep.Status), rep.Detail)
	}
	began = time.Now()
	opened := make(chan error, 1)
	go func() { opened <- s.meta.Open(ctx) }() // for the name: the cut does not wait for that
	err = together(group, func(m *groupMember) error {
		_, err := call(m, func(ctx context.Context, hc pb.HostControlClient) (*pb.CutReply, error) {
			return hc.PrepareCut(ctx, &pb.CutRequest{Volume: m.volume})
		})
		return err
	})
	if err = errors.Join(err, <-opened); err != nil {
		return began, cut, 0, err
	}
	cut = time.Now()
	hold := uint32(0) // one alone is let go at once
	if len(group) > 1 {
		hold = uint32(groupHold.Milliseconds())
	}
	var mu sync.Mutex
	note := func(us uint64) {
		mu.Lock()
		longest = max(longest, time.Duration(us)*time.Microsecond)
		mu.Unlock()
	}
	err = together(group, func(m *groupMember) error {
		rep, err := call(m, func(ctx context.Context, hc pb.HostControlClient) (*pb.CutReply, error) {
			return hc.HoldCut(ctx, &pb.CutRequest{Volume: m.volume, HoldMs: hold})
		})
		if err == nil {
			m.cut = &pb.Cut{VolumeId: rep.VolumeId, Layer: rep.Layer, SizeBytes: rep.SizeBytes}
			note(rep.HeldUs)
		}
		return err
	})
	if hold == 0 {
		return began, cut, longest, err
	}
	return began, cut, longest, errors.Join(err, together(group, func(m *groupMember) error {
		rep, err := call(m, func(ctx context.Context, hc pb.HostControlClient) (*pb.CutReply, error) {
			return hc.ReleaseCut(ctx, &pb.CutRequest{Volume: m.volume})
		})
		if err != nil || m.cut == nil {
			return err
		}
		note(rep.HeldUs)
		if !rep.Held {
			return status.Errorf(status.Timeout, "the writes of volume %s were not held until all volumes were: there is no snapshot; try again", m.volume)
		}
		return nil
	}))
}

// together does the same for all at once.
func together(group []*groupMember, f func(*groupMember) error) error {
	errs := make([]error, len(group))
	var wg sync.WaitGroup
	for i, m := range group {
		wg.Go(func() { errs[i] = f(m) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// snapshotView is a snapshot as `-o json` shows it.
type snapshotView struct {
	Volume    string   `json:"volume"`
	Name      string   `json:"name"`
	Layer     uint32   `json:"layer"`
	SizeBytes uint64   `json:"sizeBytes"`
	Created   string   `json:"created"`
	Parent    string   `json:"parent,omitempty"` // the snapshot it was taken over, directly or through deleted ones
	Clones    []string `json:"clones"`
}

func snapshotsOf(v *pb.Volume, all []*pb.Volume) []snapshotView {
	byID := map[uint32]*pb.Layer{}
	for _, l := range v.Layers {
		byID[l.Id] = l
	}
	views := []snapshotView{}
	for _, l := range v.Layers {
		if l.State != pb.LayerState_LAYER_STATE_SNAPSHOT {
			continue
		}
		w := snapshotView{Volume: v.Name, Name: l.Name, Layer: l.Id, SizeBytes: l.SizeBytes, Created: formatTime(l.CreatedUnixNs), Clones: []string{}}
		for p := l; p.HasParent && w.Parent == ""; {
			p = byID[p.Parent]
			w.Parent = p.Name
		}
		for _, o := range all {
			if o.Origin != nil && o.Origin.VolumeId == v.Id && o.Origin.Layer == l.Id {
				w.Clones = append(w.Clones, o.Name)
			}
		}
		views = append(views, w)
	}
	return views
}

func snapshotList(c *cli) *cobra.Command {
	var out outputFlag
	cmd := &cobra.Command{
		Use: "ls [VOLUME]", Aliases: []string{"list"}, Short: "List snapshots", Args: cobra.MaximumNArgs(1),
		Example: "  cairn volume snapshot ls db\n  cairn volume snapshot ls -o json",
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				rep, err := s.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Volumes{Volumes: true}})
				if err != nil {
					return err
				}
				of := rep.Volumes
				if len(args) == 1 {
					v, err := s.volume(ctx, args[0])
					if err != nil {
						return err
					}
					of = []*pb.Volume{v}
				}
				views, rows := []snapshotView{}, [][]string{}
				for _, v := range of {
					for _, w := range snapshotsOf(v, rep.Volumes) {
						views = append(views, w)
						rows = append(rows, []string{w.Volume + "@" + w.Name, formatSize(w.SizeBytes), w.Created, dash(w.Parent), dash(strings.Join(w.Clones, ","))})
					}
				}
				return out.show(views, []string{"SNAPSHOT", "SIZE", "TAKEN", "OVER", "CLONES"}, rows)
			})
		},
	}
	out.register(cmd)
	return cmd
}

func snapshotRemove(c *cli) *cobra.Command {
	var wait bool
	cmd := &cobra.Command{
		Use: "rm VOLUME@SNAPSHOT…", Short: "Delete snapshots; their space comes back", Args: cobra.MinimumNArgs(1),
		Long: `Delete snapshots, in any order. What only they showed is dropped; what a newer snapshot
or the volume still shows is merged into that, in the background while the volume is
attached. A snapshot that clones read from is refused, naming them.`,
		Example: "  cairn volume snapshot rm db@monday db@tuesday\n  cairn volume snapshot rm db@monday --wait",
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), reclaimWait, func(ctx context.Context, s *session) error {
				var names []string
				for _, a := range args {
					v, snap, err := wantSnapshot(a)
					if err != nil {
						return err
					}
					op := &pb.DeleteSnapshot{Volume: v, Name: snap}
					if _, err := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_DeleteSnapshot{DeleteSnapshot: op}}); err != nil {
						return err
					}
					if !slices.Contains(names, v) {
						names = append(names, v)
					}
				}
				for _, n := range names {
					if err := s.reclaim(ctx, n, wait); err != nil {
						return fmt.Errorf("the snapshots are deleted, but their space is not back: %w", err)
					}
				}
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&wait, "wait", false, "until their space is back")
	return cmd
}

// reclaim has deleted layers merged. A volume nobody has attached is attached for
// it, and so always waited for.
func (s *session) reclaim(ctx context.Context, name string, wait bool) error {
	v, err := s.volume(ctx, name)
	if err != nil {
		return err
	}
	merging := slices.ContainsFunc(v.Layers, func(l *pb.Layer) bool { return l.State == pb.LayerState_LAYER_STATE_DELETED })
	if !merging || v.HolderHost != "" && !wait {
		return nil
	}
	return s.whileAttached(ctx, name, func(host string) error {
		return hostDone(onHost(ctx, s, host, func(ctx context.Context, hc pb.HostControlClient) (*pb.HostReply, error) {
			return hc.ReclaimVolume(ctx, &pb.VolumeRef{Volume: name})
		}))
	})
}

// whileAttached runs f with the host that has a volume attached, and leaves it as
// it was found.
func (s *session) whileAttached(ctx context.Context, name string, f func(host string) error) (err error) {
	v, err := s.volume(ctx, name)
	if err != nil {
		return err
	}
	if v.HolderHost == "" {
		if _, err := s.attach(ctx, name, "", false); err != nil {
			return err
		}
		defer func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cliWait)
			defer cancel()
			err = errors.Join(err, s.detach(ctx, name))
		}()
		if v, err = s.volume(ctx, name); err != nil {
			return err
		}
	}
	return f(v.HolderHost)
}

func volumeRollback(c *cli) *cobra.Command {
	return &cobra.Command{
		Use: "rollback VOLUME@SNAPSHOT", Short: "Make a detached volume show a snapshot again", Args: cobra.ExactArgs(1),
		Long: `Make a detached volume show a snapshot again, at the size it had then. What was written
since the last snapshot is dropped: take one more before, if it may be wanted.`,
		Example: "  cairn volume rollback db@monday",
		RunE: func(cmd *cobra.Command, args []string) error {
			v, snap, err := wantSnapshot(args[0])
			if err != nil {
				return err
			}
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				op := &pb.RollbackVolume{Volume: v, Snapshot: snap}
				_, err := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_RollbackVolume{RollbackVolume: op}})
				return err
			})
		},
	}
}

// originView is what a clone reads through, as `-o json` shows it.
type originView struct {
	VolumeID uint64 `json:"volumeId"`
	Layer    uint32 `json:"layer"`
}

// layers fills in what a volume view says of snapshots and origin.
func (w *volumeView) layers(v *pb.Volume) {
	w.Snapshots = []string{}
	for _, l := range v.Layers {
		switch l.State {
		case pb.LayerState_LAYER_STATE_SNAPSHOT:
			w.Snapshots = append(w.Snapshots, l.Name)
		case pb.LayerState_LAYER_STATE_DELETED:
			w.Merging++
		}
	}
	if v.Origin != nil {
		w.Origin = &originView{v.Origin.VolumeId, v.Origin.Layer}
	}
}

// openSnapshot has a host show VOLUME@SNAPSHOT; fresh: it did not before.
func (s *session) openSnapshot(ctx context.Context, name, host string) (uri, on string, fresh bool, err error) {
	base, _, err := wantSnapshot(name)
	if err != nil {
		return "", "", false, err
	}
	v, err := s.volume(ctx, base)
	if err != nil {
		return "", "", false, err
	}
	if host == "" {
		if host, err = s.chooseHost(ctx, v, true); err != nil {
			return "", "", false, err
		}
	}
	rep, err := onHost(ctx, s, host, func(ctx context.Context, hc pb.HostControlClient) (*pb.AttachVolumeReply, error) {
		return hc.AttachVolume(ctx, &pb.AttachVolumeRequest{Volume: name})
	})
	if err != nil {
		return "", "", false, err
	}
	return rep.Uri, host, rep.Fresh, status.New(status.Kind(rep.Status), rep.Detail)
}

// closeSnapshot ends the views of a snapshot on every host.
func (s *session) closeSnapshot(ctx context.Context, name string) error {
	hosts, err := s.hosts(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, h := range hosts {
		if h.Up {
			err := hostDone(callHost(ctx, h.Host, func(ctx context.Context, hc pb.HostControlClient) (*pb.HostReply, error) {
				return hc.DetachVolume(ctx, &pb.DetachVolumeRequest{Volume: name})
			}))
			switch status.Of(err) {
			case status.NotFound, status.Unavailable: // what is down shows nothing
			default:
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

func volumeClone(c *cli) *cobra.Command {
	return &cobra.Command{
		Use: "clone VOLUME@SNAPSHOT NEW", Short: "Make a volume that begins as a snapshot", Args: cobra.ExactArgs(2),
		Long: `Make a volume that begins as a snapshot. Nothing is copied: the clone reads from the
snapshot's stores what it has not written itself, until it is flattened.`,
		Example: "  cairn volume import debian debian.qcow2\n  cairn volume snapshot debian --name gold\n  cairn volume clone debian@gold vm1",
		RunE: func(cmd *cobra.Command, args []string) error {
			v, snap, err := wantSnapshot(args[0])
			if err != nil {
				return err
			}
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				op := &pb.CloneVolume{Volume: v, Snapshot: snap, Name: args[1]}
				_, err := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_CloneVolume{CloneVolume: op}})
				return err
			})
		},
	}
}

func volumeFlatten(c *cli) *cobra.Command {
	return &cobra.Command{
		Use: "flatten NAME", Short: "Copy what a clone still reads from its origin, and let go of it", Args: cobra.ExactArgs(1),
		Long: `Copy what a clone still reads from its origin, and let go of it. The clone may be in use.
Cut short, it is begun again where it was. Snapshots of the clone have to be deleted
before: they read from the origin too.`,
		Example: "  cairn volume flatten vm1",
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), reclaimWait, func(ctx context.Context, s *session) error {
				v, err := s.volume(ctx, args[0])
				if err != nil {
					return err
				}
				if v.Origin == nil {
					say("volume %s is no clone", args[0])
					return nil
				}
				for _, l := range v.Layers {
					if l.State == pb.LayerState_LAYER_STATE_SNAPSHOT {
						return status.Errorf(status.Held, "snapshot %s of clone %s still reads from the clone's origin: delete it first", l.Name, args[0])
					}
				}
				return s.whileAttached(ctx, args[0], func(host string) error {
					return hostDone(onHost(ctx, s, host, func(ctx context.Context, hc pb.HostControlClient) (*pb.HostReply, error) {
						return hc.FlattenVolume(ctx, &pb.VolumeRef{Volume: args[0]})
					}))
				})
			})
		},
	}
}
