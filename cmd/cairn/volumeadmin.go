package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/proto/pb"
)

const (
	defaultKeep = 24 * time.Hour   // of a deleted volume, and of a shrink's undo
	shrinkWait  = 10 * time.Minute // the tail is read
)

func seconds(d time.Duration) int64 { return int64(d / time.Second) }

func volumeResize(c *cli) *cobra.Command {
	var size string
	var discard bool
	var keep time.Duration
	cmd := &cobra.Command{
		Use: "resize NAME --size SIZE", Short: "Grow a volume, or shrink it where nothing is lost", Args: cobra.ExactArgs(1),
		Long: `Grow a volume: a running VM sees it at once. Or shrink it: the volume's gateway
lowers the end, waits for what is under way, and looks at what lies beyond. If
there is data, it is refused and the places are named; --discard-tail cuts it off
all the same. "cairn volume undo-shrink" gives everything back for --keep.`,
		Example: "  cairn volume resize db --size 200G\n  cairn volume resize db --size 50G --keep 72h\n  cairn volume resize db --size 50G --discard-tail",
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := parseSize(size)
			if err != nil {
				return err
			}
			return c.with(cmd.Context(), shrinkWait, func(ctx context.Context, s *session) error {
				v, err := s.volume(ctx, args[0])
				if err != nil {
					return err
				}
				if n < v.SizeBytes {
					return s.shrink(ctx, v, &pb.ShrinkVolumeRequest{Volume: v.Name, SizeBytes: n, DiscardTail: discard, KeepSeconds: seconds(keep)})
				}
				return s.resize(ctx, args[0], n)
			})
		},
	}
	cmd.Flags().StringVar(&size, "size", "", "the new size")
	cmd.Flags().BoolVar(&discard, "discard-tail", false, "shrink although data lies beyond the new end; it is a chunk's border then")
	cmd.Flags().DurationVar(&keep, "keep", defaultKeep, "for how long a shrink can be undone")
	must(cmd.MarkFlagRequired("size"))
	return cmd
}

func (s *session) resize(ctx context.Context, name string, bytes uint64) error {
	res, err := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_ResizeVolume{ResizeVolume: &pb.ResizeVolume{Volume: name, SizeBytes: bytes}}})
	if err != nil {
		return err
	}
	return s.refreshed(ctx, res.Volume)
}

// refreshed returns when the volume's user sees its size. The host hears of it
// by itself; this is to know.
func (s *session) refreshed(ctx context.Context, v *pb.Volume) error {
	if v.HolderHost == "" {
		return nil
	}
	err := hostDone(onHost(ctx, s, v.HolderHost, func(ctx context.Context, hc pb.HostControlClient) (*pb.HostReply, error) {
		return hc.RefreshVolume(ctx, &pb.VolumeRef{Volume: v.Name})
	}))
	if err != nil {
		return fmt.Errorf("volume %s has its new size, but its user on host %s does not see it yet: %w", v.Name, v.HolderHost, err)
	}
	return nil
}

// shrink has the volume's gateway do it; a volume nobody has attached is
// attached for it.
func (s *session) shrink(ctx context.Context, v *pb.Volume, r *pb.ShrinkVolumeRequest) (err error) {
	host := v.HolderHost
	if host == "" {
		if host, err = s.chooseHost(ctx, v, false); err != nil {
			return err
		}
		if _, err := s.attach(ctx, v.Name, host, false); err != nil {
			return err
		}
		defer func() {
			dctx, cancel := context.WithTimeout(context.Background(), cliWait)
			defer cancel()
			err = errors.Join(err, s.detach(dctx, v.Name))
		}()
	}
	err = hostDone(onHost(ctx, s, host, func(ctx context.Context, hc pb.HostControlClient) (*pb.HostReply, error) {
		return hc.ShrinkVolume(ctx, r)
	}))
	if err == nil {
		say("volume %s has %s now; `cairn volume undo-shrink %s` gives it %s again for %v", v.Name, formatSize(r.SizeBytes), v.Name, formatSize(max(v.SizeBytes, v.ShrunkFrom)), time.Duration(r.KeepSeconds)*time.Second)
	}
	return err
}

func volumeUndoShrink(c *cli) *cobra.Command {
	var forget bool
	cmd := &cobra.Command{
		Use: "undo-shrink NAME", Short: "Give a volume the size, and every byte, it had before a shrink", Args: cobra.ExactArgs(1),
		Example: "  cairn volume undo-shrink db",
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				res, err := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_UndoShrink{UndoShrink: &pb.UndoShrink{Volume: args[0], Forget: forget}}})
				if err != nil {
					return err
				}
				return s.refreshed(ctx, res.Volume)
			})
		},
	}
	cmd.Flags().BoolVar(&forget, "forget", false, "make the shrink final now instead")
	return cmd
}

func volumeRemove(c *cli) *cobra.Command {
	var keep time.Duration
	var now bool
	cmd := &cobra.Command{
		Use: "rm NAME", Short: "Remove a volume; it can be had back for a day", Args: cobra.ExactArgs(1),
		Example: "  cairn volume rm old\n  cairn volume undelete old\n  cairn volume rm scratch --now",
		RunE: func(cmd *cobra.Command, args []string) error {
			if now {
				keep = 0
			}
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				res, err := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_DeleteVolume{DeleteVolume: &pb.DeleteVolume{Volume: args[0], KeepSeconds: seconds(keep)}}})
				if err == nil && keep > 0 {
					say("volume %s is removed; `cairn volume undelete id:%d` brings it back until %s", args[0], res.Volume.Id, formatTime(res.Volume.PurgeUnixNs))
				}
				return err
			})
		},
	}
	cmd.Flags().DurationVar(&keep, "keep", defaultKeep, "for how long it can be had back")
	cmd.Flags().BoolVar(&now, "now", false, "at once and for good")
	return cmd
}

func volumeUndelete(c *cli) *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use: "undelete NAME|id:N", Short: "Bring a removed volume back", Args: cobra.ExactArgs(1),
		Example: "  cairn volume ls --deleted\n  cairn volume undelete id:7 --name db-old",
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				_, err := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_UndeleteVolume{UndeleteVolume: &pb.UndeleteVolume{Volume: args[0], Name: name}}})
				return err
			})
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "under this name (default: the one it had)")
	return cmd
}

func volumePurge(c *cli) *cobra.Command {
	return &cobra.Command{
		Use: "purge NAME|id:N", Short: "Remove a removed volume for good, before its time", Args: cobra.ExactArgs(1),
		Example: "  cairn volume purge id:7",
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				_, err := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_PurgeVolume{PurgeVolume: &pb.PurgeVolume{Volume: args[0]}}})
				return err
			})
		},
	}
}

func volumeTrust(c *cli) *cobra.Command {
	return &cobra.Command{
		Use: "trust NAME", Short: "Open a volume that came out of a metadata backup", Args: cobra.ExactArgs(1),
		Long: `Open a volume that came out of a metadata backup. The restored metadata knows
neither the chunks that were allocated to it since the backup (they read as
zeros) nor which copies fell out of sync since (they may be read). Whoever opens
it says that this does not matter. The event log keeps who it was.`,
		Example: "  cairn volume trust db",
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				_, err := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_TrustVolume{TrustVolume: &pb.TrustVolume{Volume: args[0]}}})
				return err
			})
		},
	}
}

// qosFlags are a volume's bounds as people type them.
type qosFlags struct {
	iops, minIOPS           uint64
	bandwidth, minBandwidth string
	burst                   time.Duration
}

func (q *qosFlags) register(cmd *cobra.Command) {
	f := cmd.Flags()
	f.Uint64Var(&q.iops, "iops", 0, "at most so many operations a second (0: no bound)")
	f.StringVar(&q.bandwidth, "bandwidth", "", "at most so many bytes a second, as 100M")
	f.DurationVar(&q.burst, "burst", 0, "so much of a bound may come at once (default 1s)")
	f.Uint64Var(&q.minIOPS, "min-iops", 0, "so many operations a second at least, before other volumes of its host")
	f.StringVar(&q.minBandwidth, "min-bandwidth", "", "so many bytes a second at least, before other volumes of its host")
}

// given reports whether any of them was.
func (q *qosFlags) given(cmd *cobra.Command) bool {
	return slices.ContainsFunc([]string{"iops", "bandwidth", "burst", "min-iops", "min-bandwidth"}, cmd.Flags().Changed)
}

// qos returns the bounds a volume had with those changed that were given; nil if
// none was.
func (q *qosFlags) qos(cmd *cobra.Command, had *pb.Qos) (*pb.Qos, error) {
	if !q.given(cmd) {
		return nil, nil
	}
	out := &pb.Qos{IopsMax: had.GetIopsMax(), IopsMin: had.GetIopsMin(), BurstMs: had.GetBurstMs(), BytesPerSecondMax: had.GetBytesPerSecondMax(), BytesPerSecondMin: had.GetBytesPerSecondMin()}
	if cmd.Flags().Changed("iops") {
		out.IopsMax = q.iops
	}
	if cmd.Flags().Changed("min-iops") {
		out.IopsMin = q.minIOPS
	}
	if cmd.Flags().Changed("burst") {
		out.BurstMs = uint32(q.burst.Milliseconds())
	}
	return out, errors.Join(parseInto(&out.BytesPerSecondMax, q.bandwidth), parseInto(&out.BytesPerSecondMin, q.minBandwidth))
}

// parseInto reads a size that need not be given.
func parseInto(n *uint64, text string) (err error) {
	if text != "" {
		*n, err = parseSize(text)
	}
	return err
}

func parseTags(list []string) (map[string]string, error) {
	tags := map[string]string{}
	for _, t := range list {
		k, v, ok := strings.Cut(t, "=")
		if !ok || k == "" {
			return nil, usagef("%q is not a tag: write name=value", t)
		}
		tags[k] = v
	}
	return tags, nil
}

func volumeSet(c *cli) *cobra.Command {
	var q qosFlags
	var tags, untag []string
	var replicas uint32
	cmd := &cobra.Command{
		Use: "set NAME", Short: "Change a volume's tags, bounds and number of copies", Args: cobra.ExactArgs(1),
		Long: `Change a volume's tags, bounds and number of copies. Bounds hold within seconds, for a
running VM too; those not given stay as they are, and 0 takes one away. A minimum (--min-iops,
--min-bandwidth) is kept by holding back the other volumes attached on the same host while
this one asks for more than it gets; of two minima, either keeps the promise. Copies are
made, or given up, in the background while the volume is used; a further one goes to its
host first.`,
		Example: "  cairn volume set db --tag tier=gold --untag old\n  cairn volume set db --iops 5000 --bandwidth 200M\n  cairn volume set db --min-iops 1000\n  cairn volume set db --iops 0   # no such bound\n  cairn volume set db --replicas 3",
		RunE: func(cmd *cobra.Command, args []string) error {
			if _, err := q.qos(cmd, nil); err != nil {
				return err
			}
			set, err := parseTags(tags)
			if err != nil {
				return err
			}
			more := cmd.Flags().Changed("replicas")
			if more && (replicas < 1 || replicas > 5) {
				return usagef("--replicas %d: 1 to 5 are possible", replicas)
			}
			if !q.given(cmd) && len(set)+len(untag) == 0 && !more {
				return usagef("volume set: nothing to change: see `cairn volume set --help`")
			}
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				if more {
					op := &pb.SetReplicas{Volume: args[0], Replicas: replicas}
					if _, err := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_SetReplicas{SetReplicas: op}}); err != nil {
						return err
					}
				}
				if !q.given(cmd) && len(set)+len(untag) == 0 {
					return nil
				}
				op := &pb.UpdateVolume{Volume: args[0], SetTags: set, RemoveTags: untag}
				if q.given(cmd) {
					v, err := s.volume(ctx, args[0])
					if err != nil {
						return err
					}
					if op.Qos, err = q.qos(cmd, v.Qos); err != nil {
						return err
					}
				}
				_, err := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_UpdateVolume{UpdateVolume: op}})
				return err
			})
		},
	}
	q.register(cmd)
	cmd.Flags().Uint32Var(&replicas, "replicas", 0, "how many copies of each chunk, 1 to 5")
	cmd.Flags().StringSliceVar(&tags, "tag", nil, "name=value, again and again")
	cmd.Flags().StringSliceVar(&untag, "untag", nil, "name of a tag to take away")
	return cmd
}

// ---- tenants

type tenantView struct {
	Name          string `json:"name"`
	Volumes       uint64 `json:"volumes"`
	Logical       uint64 `json:"logicalBytes"` // sizes, deleted volumes included
	LogicalQuota  uint64 `json:"logicalQuotaBytes"`
	Physical      uint64 `json:"physicalBytes"` // chunks × copies
	PhysicalQuota uint64 `json:"physicalQuotaBytes"`
	Deleted       uint64 `json:"deletedBytes"` // part of logical
}

func viewTenant(t *pb.Tenant) tenantView {
	return tenantView{t.Name, t.Volumes, t.LogicalBytes, t.LogicalQuotaBytes, t.PhysicalBytes, t.PhysicalQuotaBytes, t.DeletedBytes}
}

func (s *session) tenants(ctx context.Context) ([]tenantView, error) {
	rep, err := s.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Tenants{Tenants: true}})
	out := []tenantView{}
	for _, t := range rep.GetTenants() {
		out = append(out, viewTenant(t))
	}
	return out, err
}

// ofQuota is "used of quota".
func ofQuota(n, quota uint64) string {
	if quota == 0 {
		return formatSize(n)
	}
	return fmt.Sprintf("%s of %s (%d %%)", formatSize(n), formatSize(quota), n*100/quota)
}

func tenantCommand(c *cli) *cobra.Command {
	cmd := &cobra.Command{Use: "tenant", Short: "Tenants: who volumes belong to, and their quotas"}
	var out outputFlag
	ls := &cobra.Command{
		Example: "  cairn tenant ls",
		Use:     "ls", Short: "List the tenants", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				views, err := s.tenants(ctx)
				if err != nil {
					return err
				}
				var rows [][]string
				for _, w := range views {
					rows = append(rows, []string{dash(w.Name), fmt.Sprint(w.Volumes), ofQuota(w.Logical, w.LogicalQuota), ofQuota(w.Physical, w.PhysicalQuota), formatSize(w.Deleted)})
				}
				return out.show(views, []string{"TENANT", "VOLUMES", "LOGICAL", "PHYSICAL", "DELETED"}, rows)
			})
		},
	}
	out.register(ls)
	var logical, physical string
	set := &cobra.Command{
		Use: "set NAME", Short: "Set a tenant's quotas", Args: cobra.ExactArgs(1),
		Example: "  cairn tenant set acme --logical 10T --physical 12T\n  cairn tenant set acme --physical 0   # none",
		RunE: func(cmd *cobra.Command, args []string) error {
			if logical == "" && physical == "" {
				return usagef("tenant set: nothing to change: --logical or --physical, 0 for no quota")
			}
			op := &pb.SetTenant{Tenant: args[0]}
			quotas := func() error {
				return errors.Join(parseInto(&op.LogicalQuotaBytes, logical), parseInto(&op.PhysicalQuotaBytes, physical))
			}
			if err := quotas(); err != nil {
				return err
			}
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				had, err := s.tenants(ctx)
				if err != nil {
					return err
				}
				for _, t := range had { // what is not given stays
					if t.Name == args[0] {
						op.LogicalQuotaBytes, op.PhysicalQuotaBytes = t.LogicalQuota, t.PhysicalQuota
					}
				}
				if err := quotas(); err != nil {
					return err
				}
				_, err = s.meta.Do(ctx, &pb.Command{Op: &pb.Command_SetTenant{SetTenant: op}})
				return err
			})
		},
	}
	set.Flags().StringVar(&logical, "logical", "", "of all volumes' sizes together")
	set.Flags().StringVar(&physical, "physical", "", "of all their chunks and copies together")
	cmd.AddCommand(ls, set)
	return cmd
}

// ---- what there is

// poolView is where the space went. On the stores:
//
//	capacity = live + reclaimable + free
//	live     = of volumes + of deleted volumes + of nobody
type poolView struct {
	Capacity    uint64       `json:"capacityBytes"`    // of the stores in service
	Used        uint64       `json:"usedBytes"`        // of them: segments in use
	Free        uint64       `json:"freeBytes"`        // capacity - used
	Live        uint64       `json:"liveBytes"`        // blocks that can be read, all copies
	Reclaimable uint64       `json:"reclaimableBytes"` // used - live: comes back by compaction
	OfVolumes   uint64       `json:"liveOfVolumesBytes"`
	OfDeleted   uint64       `json:"liveOfDeletedBytes"`
	OfNobody    uint64       `json:"liveOfNobodyBytes"` // removed and not swept yet, or written since
	Logical     uint64       `json:"logicalBytes"`      // sizes of all volumes
	Placed      uint64       `json:"placedBytes"`       // chunks × copies
	Thick       uint64       `json:"thickBytes"`        // set aside for thick volumes
	Silent      []string     `json:"silentHosts"`       // hosts whose part is as of their last word, and has no volumes in it
	Volumes     []poolVolume `json:"volumes"`
}

type poolVolume struct {
	Name    string `json:"name"`
	Tenant  string `json:"tenant,omitempty"`
	Logical uint64 `json:"logicalBytes"`
	Placed  uint64 `json:"placedBytes"`
	Live    uint64 `json:"liveBytes"` // all copies
	Deleted bool   `json:"deleted"`
}

// pool adds up what metadata and every store say.
func (s *session) pool(ctx context.Context) (*poolView, error) {
	rep, err := s.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Tenants{Tenants: true}, WithVolumes: true})
	if err != nil {
		return nil, err
	}
	p := &poolView{Logical: rep.Pool.LogicalBytes, Placed: rep.Pool.PlacedBytes, Thick: rep.Pool.ThickBytes, Silent: []string{}, Volumes: []poolVolume{}}
	live, err := s.liveBytes(ctx, p)
	if err != nil {
		return nil, err
	}
	for _, v := range rep.Volumes {
		x := poolVolume{Name: v.Name, Tenant: v.Tenant, Logical: v.SizeBytes, Placed: v.ChunkCount * v.ChunkBytes * uint64(v.Replicas), Live: live[v.Id], Deleted: v.DeletedUnixNs > 0}
		if x.Deleted {
			p.OfDeleted += x.Live
		} else {
			p.OfVolumes += x.Live
		}
		delete(live, v.Id)
		p.Volumes = append(p.Volumes, x)
	}
	for _, n := range live {
		p.OfNobody += n
	}
	p.Live = p.OfVolumes + p.OfDeleted + p.OfNobody
	p.Free = p.Capacity - min(p.Used, p.Capacity)
	p.Reclaimable = p.Used - min(p.Live, p.Used)
	return p, nil
}

// liveBytes asks every host what its stores hold, and sums capacity and use.
func (s *session) liveBytes(ctx context.Context, p *poolView) (map[uint64]uint64, error) {
	hosts, err := s.hosts(ctx)
	if err != nil {
		return nil, err
	}
	live := map[uint64]uint64{}
	for _, h := range hosts {
		stores := []*pb.StoreUsage{}
		for _, st := range h.Stores {
			if !st.Store.Retired && st.Usage != nil {
				stores = append(stores, st.Usage)
			}
		}
		rep, err := callHost(ctx, h.Host, func(ctx context.Context, hc pb.HostControlClient) (*pb.HostStatusReply, error) {
			return hc.HostStatus(ctx, &pb.HostStatusRequest{})
		})
		if err != nil {
			p.Silent = append(p.Silent, h.Host.Name)
		} else {
			stores = rep.Stores
			for _, u := range rep.Volumes {
				live[u.VolumeId] += u.LiveBytes
			}
		}
		for _, u := range stores {
			p.Capacity += u.CapacityBytes
			p.Used += u.UsedBytes
		}
	}
	return live, nil
}

func dfCommand(c *cli) *cobra.Command {
	var out outputFlag
	cmd := &cobra.Command{
		Example: "  cairn df\n  cairn df -o json",
		Use:     "df", Short: "Where the space went: promised, placed, live, reclaimable, free", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				p, err := s.pool(ctx)
				if err != nil {
					return err
				}
				if out.format != "table" {
					return out.show(p, nil, nil)
				}
				return p.print()
			})
		},
	}
	out.register(cmd)
	return cmd
}

func (p *poolView) print() error {
	line := func(name string, n uint64, what string) []string { return []string{name, formatSize(n), what} }
	rows := [][]string{
		line("capacity", p.Capacity, "of the stores in service"),
		line("  live", p.Live, "blocks that can be read, all copies"),
		line("    of volumes", p.OfVolumes, ""),
		line("    of deleted volumes", p.OfDeleted, "comes back when they are purged"),
		line("    of nobody", p.OfNobody, "removed, and swept in a moment"),
		line("  reclaimable", p.Reclaimable, "overwritten or removed: comes back by compaction"),
		line("  free", p.Free, ""),
		line("logical", p.Logical, "sizes of all volumes"),
		line("placed", p.Placed, "chunks with all copies"),
		line("thick", p.Thick, "set aside for thick volumes"),
	}
	if err := printTable(nil, rows); err != nil {
		return err
	}
	for _, h := range p.Silent {
		fmt.Printf("host %s does not answer: what it holds is not counted by volume\n", h)
	}
	if len(p.Volumes) == 0 {
		return nil
	}
	fmt.Println()
	var vols [][]string
	for _, v := range p.Volumes {
		name := v.Name
		if v.Deleted {
			name += " (deleted)"
		}
		vols = append(vols, []string{name, dash(v.Tenant), formatSize(v.Logical), formatSize(v.Placed), formatSize(v.Live)})
	}
	return printTable([]string{"VOLUME", "TENANT", "LOGICAL", "PLACED", "LIVE"}, vols)
}
