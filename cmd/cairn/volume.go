package main

import (
	"context"
	"fmt"
	"sort"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/nbd/kernel"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

func volumeCommand(c *cli) *cobra.Command {
	cmd := &cobra.Command{Use: "volume", Aliases: []string{"vol"}, Short: "Thin, replicated volumes"}
	cmd.AddCommand(volumeCreate(c), volumeList(c), volumeShow(c), volumeRename(c), volumeResize(c), volumeRemove(c), volumeUndelete(c), volumePurge(c), volumeUndoShrink(c), volumeSet(c), volumeTrust(c),
		volumeAttach(c), volumeDetach(c), volumeStats(c), volumeImport(c), volumeExport(c), volumeSnapshot(c), volumeRollback(c), volumeClone(c), volumeFlatten(c),
		volumeDiff(c), volumeMap(c), volumeBackup(c), volumeRestore(c))
	return cmd
}

// volumeView is a volume as `-o json` shows it.
type volumeView struct {
	ID        uint64       `json:"id"`
	Name      string       `json:"name"`
	SizeBytes uint64       `json:"sizeBytes"`
	Allocated uint64       `json:"allocatedBytes"` // of chunks that exist, one copy
	Replicas  uint32       `json:"replicas"`
	Domain    string       `json:"failureDomain"`
	Epoch     uint32       `json:"epoch"`
	Revision  uint64       `json:"revision"`
	Holder    string       `json:"attachedOn,omitempty"`
	Snapshots []string     `json:"snapshots"`
	Origin    *originView  `json:"origin,omitempty"` // of a clone
	Merging   int          `json:"layersToMerge"`    // of deleted snapshots
	State     string       `json:"state"`
	URI       string       `json:"uri,omitempty"`
	Created   string       `json:"created"`
	StallUs   uint64       `json:"maxWriteStallUs"` // longest a write has waited since the attach
	Members   []memberView `json:"members"`

	Tenant   string            `json:"tenant,omitempty"`
	Tags     map[string]string `json:"tags,omitempty"`
	Thick    bool              `json:"thick"`
	Qos      *qosView          `json:"qos,omitempty"`
	Deleted  string            `json:"deleted,omitempty"` // when
	PurgeAt  string            `json:"purgeAt,omitempty"` // when a deleted one goes for good
	Shrunk   uint64            `json:"shrunkFromBytes,omitempty"`
	UndoTill string            `json:"undoUntil,omitempty"`

	erred   uint64   // its users' requests that were answered with an error
	erredAt int64    // the last of them, in Unix nanoseconds
	erredBy string   // and what it was
	serves  string   // what its gateway says it does; "": it was not asked
	full    uint64   // writes that wait for room
	fullOn  []string // on these hosts
	Closed  bool     `json:"closed,omitempty"` // it came out of a metadata backup: `cairn volume trust`
}

// qosView is a volume's bounds; 0 is none.
type qosView struct {
	IOPS         uint64 `json:"iopsMax"`
	Bandwidth    uint64 `json:"bytesPerSecondMax"`
	BurstMs      uint32 `json:"burstMs"`
	MinIOPS      uint64 `json:"iopsMin"`
	MinBandwidth uint64 `json:"bytesPerSecondMin"`
}

func (w *volumeView) admin(v *pb.Volume) {
	w.Tenant, w.Tags, w.Thick, w.Shrunk, w.Closed = v.Tenant, v.Tags, v.Thick, v.ShrunkFrom, v.RestoredUnixNs > 0
	if q := v.Qos; q != nil {
		w.Qos = &qosView{q.IopsMax, q.BytesPerSecondMax, q.BurstMs, q.IopsMin, q.BytesPerSecondMin}
	}
	if v.DeletedUnixNs > 0 {
		w.Deleted, w.PurgeAt, w.State = formatTime(v.DeletedUnixNs), formatTime(v.PurgeUnixNs), "deleted"
	}
	if v.ShrunkFrom > 0 {
		w.UndoTill = formatTime(v.UndoUnixNs)
	}
	if w.Closed {
		w.State += ", closed"
	}
}

// burstOf is how much of a bound may come at once.
func burstOf(q *qosView) time.Duration {
	if q.BurstMs == 0 {
		return time.Second
	}
	return time.Duration(q.BurstMs) * time.Millisecond
}

// adminRows are what `show` says of it.
func (w *volumeView) adminRows() (rows [][]string) {
	if w.Tenant != "" {
		rows = append(rows, []string{"tenant", w.Tenant})
	}
	if len(w.Tags) > 0 {
		var tags []string
		for k, v := range w.Tags {
			tags = append(tags, k+"="+v)
		}
		sort.Strings(tags)
		rows = append(rows, []string{"tags", strings.Join(tags, " ")})
	}
	if w.Thick {
		rows = append(rows, []string{"space", "set aside (thick)"})
	}
	if q := w.Qos; q != nil {
		rows = append(rows, []string{"bounds", fmt.Sprintf("at most %d IOPS, %s/s, with bursts of %v; at least %d IOPS, %s/s (0: none)", q.IOPS, formatSize(q.Bandwidth), burstOf(q), q.MinIOPS, formatSize(q.MinBandwidth))})
	}
	if w.Shrunk > 0 {
		rows = append(rows, []string{"shrunk from", fmt.Sprintf("%s; undo-shrink until %s", formatSize(w.Shrunk), w.UndoTill)})
	}
	return rows
}

type memberView struct {
	Store       string `json:"store"`
	Host        string `json:"host"`
	InSync      bool   `json:"inSync"`
	State       string `json:"state"`
	JoinedBytes uint64 `json:"joinedBytes"` // sent by the running or last catch-up
	LiveBytes   uint64 `json:"liveBytes"`
	BadBlocks   uint64 `json:"badBlocks"` // that cannot be read now; of `status` only
	OutSince    string `json:"outSince,omitempty"`
	outUnixNs   int64
}

func viewVolume(v *pb.Volume) volumeView {
	w := volumeView{ID: v.Id, Name: v.Name, SizeBytes: v.SizeBytes, Allocated: min(v.ChunkCount*v.ChunkBytes, v.SizeBytes), Replicas: v.Replicas, Domain: v.Domain,
		Epoch: v.Epoch, Revision: v.Revision, Holder: v.HolderHost, State: "free", Created: formatTime(v.CreatedUnixNs), Members: []memberView{}}
	w.layers(v)
	if v.HolderHost != "" {
		w.State = "attached"
	}
	for _, m := range v.Members {
		mv := memberView{Store: fmt.Sprintf("%x", m.Store), Host: m.Host, InSync: m.InSync, State: "in-sync"}
		if !m.InSync {
			mv.State, w.State = "out", w.State+", degraded"
			if mv.outUnixNs = m.OutUnixNs; m.OutUnixNs > 0 {
				mv.OutSince = formatTime(m.OutUnixNs)
			}
		}
		w.Members = append(w.Members, mv)
	}
	w.admin(v)
	if strings.Count(w.State, ", degraded") > 1 {
		w.State = strings.Replace(w.State, ", degraded", "", strings.Count(w.State, ", degraded")-1)
	}
	return w
}

func volumeCreate(c *cli) *cobra.Command {
	var size, domain, tenant string
	var replicas uint32
	var thick bool
	var tags []string
	var q qosFlags
	cmd := &cobra.Command{
		Use:     "create NAME... --size SIZE",
		Short:   "Create thin volumes",
		Long:    "Create a thin volume of each name, all alike: all of them, or none if one cannot be.",
		Example: "  cairn volume create db --size 100G\n  cairn volume create scratch --size 1T --replicas 2\n  cairn volume create web-{1..40} --size 20G",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := parseSize(size)
			if err != nil {
				return err
			}
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				op := &pb.CreateVolume{Name: args[0], SizeBytes: n, Replicas: replicas, Domain: domain, Tenant: tenant, Thick: thick}
				if op.Tags, err = parseTags(tags); err != nil {
					return err
				}
				if op.Qos, err = q.qos(cmd, nil); err != nil {
					return err
				}
				cmd := &pb.Command{Op: &pb.Command_CreateVolume{CreateVolume: op}}
				if len(args) > 1 { // nodes of before state version 5 know only one
					cmd.Op = &pb.Command_CreateVolumes{CreateVolumes: &pb.CreateVolumes{Like: op, Names: args}}
				}
				res, err := s.meta.Do(ctx, cmd)
				if err != nil {
					return err
				}
				made := res.Volumes
				if res.Volume != nil {
					made = []*pb.Volume{res.Volume}
				}
				for _, v := range made {
					say("volume %s: %s, %s, one per %s", v.Name, formatSize(n), count(int(v.Replicas), "replica"), v.Domain)
				}
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&size, "size", "", "size: 512M, 10G, 1T")
	cmd.Flags().Uint32Var(&replicas, "replicas", 0, "copies, 1 to 5 (default 3, or as many as there are failure domains)")
	cmd.Flags().StringVar(&domain, "domain", "host", "no two copies in the same host, rack or zone")
	cmd.Flags().StringVar(&tenant, "tenant", "", "whose it is: that tenant's quotas hold")
	cmd.Flags().BoolVar(&thick, "thick", false, "set the space for all of it aside")
	cmd.Flags().StringSliceVar(&tags, "tag", nil, "name=value, again and again")
	q.register(cmd)
	must(cmd.MarkFlagRequired("size"))
	return cmd
}

func volumeList(c *cli) *cobra.Command {
	var out outputFlag
	var deleted bool
	cmd := &cobra.Command{
		Example: "  cairn volume ls\n  cairn volume ls --deleted -o json",
		Use:     "ls", Aliases: []string{"list"}, Short: "List the volumes", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				q := &pb.QueryRequest{Q: &pb.QueryRequest_Volumes{Volumes: true}}
				if deleted {
					q.Q = &pb.QueryRequest_DeletedVolumes{DeletedVolumes: true}
				}
				rep, err := s.meta.Query(ctx, q)
				if err != nil {
					return err
				}
				if deleted {
					return showDeleted(&out, rep.Volumes)
				}
				views, rows := []volumeView{}, [][]string{}
				for _, v := range rep.Volumes {
					w := viewVolume(v)
					views = append(views, w)
					rows = append(rows, []string{w.Name, formatSize(w.SizeBytes), formatSize(w.Allocated), fmt.Sprint(w.Replicas), w.State, dash(w.Holder)})
				}
				return out.show(views, []string{"NAME", "SIZE", "ALLOCATED", "REPLICAS", "STATE", "ATTACHED ON"}, rows)
			})
		},
	}
	cmd.Flags().BoolVar(&deleted, "deleted", false, "those that can be had back")
	out.register(cmd)
	return cmd
}

func showDeleted(out *outputFlag, vs []*pb.Volume) error {
	views, rows := []volumeView{}, [][]string{}
	for _, v := range vs {
		w := viewVolume(v)
		views = append(views, w)
		rows = append(rows, []string{fmt.Sprintf("id:%d", w.ID), w.Name, formatSize(w.SizeBytes), formatSize(w.Allocated), w.Deleted, w.PurgeAt})
	}
	return out.show(views, []string{"ID", "NAME", "SIZE", "ALLOCATED", "DELETED", "PURGED AT"}, rows)
}

func volumeShow(c *cli) *cobra.Command {
	var out outputFlag
	cmd := &cobra.Command{
		Example: "  cairn volume show db",
		Use:     "show NAME", Short: "Show a volume, its replicas and their state", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				w, err := s.volumeView(ctx, args[0])
				if err != nil {
					return err
				}
				rows := [][]string{{"name", w.Name}, {"size", formatSize(w.SizeBytes)}, {"allocated", formatSize(w.Allocated)},
					{"replicas", fmt.Sprintf("%d, one per %s", w.Replicas, w.Domain)}, {"state", w.State}, {"attached on", dash(w.Holder)},
					{"uri", dash(w.URI)}, {"epoch, revision", fmt.Sprintf("%d, %d", w.Epoch, w.Revision)}, {"created", w.Created}}
				rows = append(rows, w.adminRows()...)
				if len(w.Snapshots) > 0 {
					rows = append(rows, []string{"snapshots", strings.Join(w.Snapshots, " ")})
				}
				if w.Origin != nil {
					from, err := s.originName(ctx, w.Origin)
					if err != nil {
						return err
					}
					rows = append(rows, []string{"clone of", from})
				}
				for _, m := range w.Members {
					since := ""
					if m.OutSince != "" {
						since = " since " + m.OutSince
					}
					rows = append(rows, []string{"replica on " + m.Host, fmt.Sprintf("%s%s  store %s, %s live", m.State, since, m.Store[:8], formatSize(m.LiveBytes))})
				}
				return out.show(w, nil, rows)
			})
		},
	}
	out.register(cmd)
	return cmd
}

// originName is VOLUME@SNAPSHOT of what a clone reads through.
func (s *session) originName(ctx context.Context, o *originView) (string, error) {
	v, err := s.volume(ctx, fmt.Sprintf("id:%d", o.VolumeID))
	if err != nil {
		return "", err
	}
	for _, l := range v.Layers {
		if l.Id == o.Layer {
			return v.Name + "@" + l.Name, nil
		}
	}
	return v.Name, nil
}

// volumeView joins what metadata, the gateway and the stores' hosts say.
func (s *session) volumeView(ctx context.Context, name string) (*volumeView, error) {
	v, err := s.volume(ctx, name)
	if err != nil {
		return nil, err
	}
	w := viewVolume(v)
	hosts, err := s.hosts(ctx)
	if err != nil {
		return nil, err
	}
	for _, h := range hosts {
		if !h.Up {
			continue
		}
		st, err := callHost(ctx, h.Host, func(ctx context.Context, hc pb.HostControlClient) (*pb.HostStatusReply, error) {
			return hc.HostStatus(ctx, &pb.HostStatusRequest{})
		})
		if err != nil {
			continue // shown as metadata has it
		}
		w.merge(v, st)
	}
	return &w, nil
}

// merge adds what one host says of the volume.
func (w *volumeView) merge(v *pb.Volume, st *pb.HostStatusReply) {
	for _, u := range st.Volumes {
		for i := range w.Members {
			if u.VolumeId == v.Id && w.Members[i].Host == st.Host {
				w.Members[i].LiveBytes = u.LiveBytes
			}
		}
	}
	for _, a := range st.Attachments {
		if a.VolumeId != v.Id || st.Host != v.HolderHost {
			continue
		}
		w.URI, w.StallUs, w.serves, w.full, w.fullOn = a.Uri, a.MaxWriteStallUs, a.State, a.FullWrites, a.FullOn
		w.erred, w.erredAt, w.erredBy = a.Errors, a.ErrorUnixNs, a.Error
		if a.State != "serving" {
			w.State = a.State
		}
		for _, r := range a.Replicas {
			for i := range w.Members {
				if w.Members[i].Store == fmt.Sprintf("%x", r.Store) {
					w.Members[i].State, w.Members[i].JoinedBytes = r.State, r.JoinedBytes
				}
			}
		}
	}
}

func volumeRename(c *cli) *cobra.Command {
	return &cobra.Command{
		Example: "  cairn volume rename db db-old",
		Use:     "rename NAME NEW", Short: "Give a volume that nobody has attached another name", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				_, err := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_RenameVolume{RenameVolume: &pb.RenameVolume{Volume: args[0], Name: args[1]}}})
				return err
			})
		},
	}
}

func volumeAttach(c *cli) *cobra.Command {
	var host string
	var takeover, handOver, device bool
	var kc kernel.Config
	cmd := &cobra.Command{
		Use:   "attach NAME",
		Short: "Attach a volume on a host and print its NBD URI, or make it a block device of this machine",
		Long: `Attach a volume on a host and print its NBD URI, alone, on standard output.
A volume that is attached already is attached where it is.

With --device the volume becomes a block device of this machine's kernel, and its path is
printed instead. A process of its own keeps it connected and lets it grow with the volume.`,
		Example: "  qemu-img info $(cairn volume attach v)\n  nbdcopy disk.img $(cairn volume attach v)\n  mkfs.ext4 $(cairn volume attach v --device)",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				if handOver {
					if host == "" {
						return usagef("--hand-over needs --host: where the volume is to go")
					}
					if err := s.handOver(ctx, args[0], host); err != nil {
						return err
					}
				}
				uri, err := s.attach(ctx, args[0], host, takeover)
				if err == nil && device {
					kc.URI, kc.Index = uri, -1
					uri, err = attachDevice(ctx, kc)
				}
				if err == nil {
					fmt.Println(uri)
				}
				return err
			})
		},
	}
	cmd.Flags().StringVar(&host, "host", "", "host (default: where it is attached, else where most of it is)")
	cmd.Flags().BoolVar(&handOver, "hand-over", false, "when another host holds it, have that one flush it and give it up: nobody waits for a lease")
	cmd.Flags().BoolVar(&takeover, "takeover", false, "even when another host holds it: that host is fenced")
	cmd.Flags().BoolVar(&device, "device", false, "make it a block device of this machine, and print that")
	deviceFlags(cmd, &kc)
	return cmd
}

// attach attaches a volume and returns its URI.
func (s *session) attach(ctx context.Context, name, host string, takeover bool) (string, error) {
	if strings.Contains(name, "@") {
		uri, _, _, err := s.openSnapshot(ctx, name, host)
		return uri, err
	}
	v, err := s.volume(ctx, name)
	if err != nil {
		return "", err
	}
	if host == "" {
		if host, err = s.chooseHost(ctx, v, takeover); err != nil {
			return "", err
		}
	}
	rep, err := onHost(ctx, s, host, func(ctx context.Context, hc pb.HostControlClient) (*pb.AttachVolumeReply, error) {
		return hc.AttachVolume(ctx, &pb.AttachVolumeRequest{Volume: name, Takeover: takeover})
	})
	if err != nil {
		return "", err
	}
	return rep.Uri, status.New(status.Kind(rep.Status), rep.Detail)
}

// chooseHost picks where a volume is attached: where it is already, unless that
// host is gone and may be overruled; else a host that is up and holds a copy.
func (s *session) chooseHost(ctx context.Context, v *pb.Volume, takeover bool) (string, error) {
	hosts, err := s.hosts(ctx)
	if err != nil {
		return "", err
	}
	up := map[string]bool{}
	var names []string
	for _, h := range hosts {
		if up[h.Host.Name] = h.Up && !h.Host.Drained; up[h.Host.Name] {
			names = append(names, h.Host.Name)
		}
	}
	if v.HolderHost != "" && (up[v.HolderHost] || !takeover) {
		return v.HolderHost, nil
	}
	for _, m := range v.Members {
		if m.InSync && up[m.Host] {
			return m.Host, nil
		}
	}
	if len(names) == 0 {
		return "", status.Errorf(status.Unavailable, "no host is up: `cairn host ls` shows since when")
	}
	sort.Strings(names)
	return names[int(v.Id)%len(names)], nil
}

func volumeDetach(c *cli) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "detach NAME", Short: "Flush a volume and let it go",
		Long: `Flush a volume and let it go. What cannot be flushed within 10 seconds, because its stores
are full or away, stays attached, and the command says why.

With --force it is let go whatever waits: writes that nobody was told are done may be lost,
all others are on every copy that is in sync, and the next attach makes them durable.`,
		Example: "  cairn volume detach db\n  cairn volume detach db --force",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error { return s.detachBy(ctx, args[0], force) })
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "let it go even if writes wait, for room or for stores that are away")
	return cmd
}

func (s *session) detach(ctx context.Context, name string) error { return s.detachBy(ctx, name, false) }

func (s *session) detachBy(ctx context.Context, name string, force bool) error {
	if strings.Contains(name, "@") {
		return s.closeSnapshot(ctx, name)
	}
	v, err := s.volume(ctx, name)
	if err != nil {
		return err
	}
	if v.HolderHost == "" {
		say("volume %s is not attached", name)
		return nil
	}
	if err := deviceFree(name); err != nil {
		return err
	}
	rep, err := onHost(ctx, s, v.HolderHost, func(ctx context.Context, hc pb.HostControlClient) (*pb.HostReply, error) {
		return hc.DetachVolume(ctx, &pb.DetachVolumeRequest{Volume: name, Force: force})
	})
	if err != nil {
		return fmt.Errorf("%w; `cairn volume attach %s --takeover` serves the volume elsewhere", err, name)
	}
	return hostDone(rep, nil)
}
