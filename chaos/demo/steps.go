package demo

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cairnstore/cairn/chaos/cluster"
	"github.com/cairnstore/cairn/chaos/guest"
)

const (
	guestWait   = 90 * time.Second // one command in the guest, or one step of its life
	catchUpWait = 60 * time.Second
	pollEvery   = 50 * time.Millisecond
	writerFor   = 300 // seconds the guest's writer runs at most
)

func (d *demo) prepare(ctx context.Context) (string, error) {
	img, err := guest.Ensure(ctx, guest.Config{Progress: func(what string) { d.say("            %s", what) }})
	d.img = img
	return img.Release, err
}

func (d *demo) start(ctx context.Context) (string, error) {
	var err error
	d.c, err = cluster.Start(ctx, cluster.Config{Bin: d.cfg.Bin, Dir: filepath.Join(d.dir, "c"), Hosts: 3})
	if err != nil {
		return "", err
	}
	leader, err := d.c.MetaLeader()
	return "leader of the metadata: " + leader, err
}

// volumes imports an image that it has just made of real files, and creates
// the guest's disk.
func (d *demo) volumes(ctx context.Context) (string, error) {
	img, files := filepath.Join(d.dir, "seed.img"), filepath.Join(d.dir, "files")
	if err := os.Mkdir(files, 0o755); err != nil {
		return "", err
	}
	bin, err := os.ReadFile(d.cfg.Bin)
	if err != nil {
		return "", err
	}
	for i := range 4 { // real files of different sizes
		part := bin[i*len(bin)/8 : (i+1)*len(bin)/8+i*1000]
		if err := os.WriteFile(filepath.Join(files, fmt.Sprintf("part-%d.bin", i)), part, 0o644); err != nil {
			return "", err
		}
	}
	out, err := exec.CommandContext(ctx, "mkfs.ext4", "-q", "-d", files, img, "64M").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("mkfs.ext4: %w: %s", err, out)
	}
	cmd := exec.CommandContext(ctx, d.cfg.Bin, "volume", "import", seedName, img, "--dir", d.c.Dir())
	cmd.Stderr = os.Stderr // its progress bar
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("volume import: %w", err)
	}
	if _, err := d.cairn(ctx, "volume", "create", diskName, "--size", "8G", "--replicas", "3"); err != nil {
		return "", err
	}
	v, err := d.volume(ctx)
	return fmt.Sprintf("%s: 8 GiB, %d bytes allocated", diskName, v.AllocatedBytes), err
}

// boot defines the VM, starts it on host-1 and waits for its shell.
func (d *demo) boot(ctx context.Context) (string, error) {
	_, err := d.cairn(ctx, "vm", "create", vmName, "--volume", diskName, "--disk", seedName, "--memory", strconv.Itoa(guest.MemoryBytes),
		"--kernel", d.img.Kernel, "--initrd", d.img.Initrd, "--append", d.img.Append)
	if err != nil {
		return "", err
	}
	return d.startOn(ctx, "host-1")
}

type vmView struct {
	State   string `json:"state"`
	Accel   string `json:"accel"`
	Console string `json:"console"`
	Host    string `json:"host"`
}

func (d *demo) startOn(ctx context.Context, host string) (string, error) {
	if _, err := d.cairn(ctx, "vm", "start", vmName, "--host", host); err != nil {
		return "", err
	}
	var vm vmView
	if err := d.ask(ctx, &vm, "vm", "show", vmName); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, guestWait)
	defer cancel()
	con, err := guest.Dial(ctx, vm.Console)
	if err != nil {
		return "", fmt.Errorf("the guest's console: %w", err)
	}
	d.con = con
	return "accelerator " + vm.Accel, nil
}

func (d *demo) fill(ctx context.Context) (string, error) {
	for _, c := range []string{
		"mkfs.ext4 -q -E nodiscard /dev/vda",
		"mkdir -p /mnt /seed && mount -t ext4 /dev/vda /mnt && mount -t ext4 -o ro /dev/vdb /seed",
		"cp /seed/*.bin /mnt/ && cat /seed/*.bin > /mnt/all.bin",
		"sync && cd /mnt && sha256sum *.bin > sums && sync",
	} {
		if _, err := d.inGuest(ctx, c); err != nil {
			return "", err
		}
	}
	size, err := d.inGuest(ctx, "du -sm /mnt | cut -f1")
	if err != nil {
		return "", err
	}
	n, err := d.inGuest(ctx, "wc -l < /mnt/sums")
	return fmt.Sprintf("%s files, %s MiB, durable and summed", n, size), err
}

// startWriter lets the guest write and fsync for ever, counting.
func (d *demo) startWriter(ctx context.Context) error {
	_, err := d.inGuest(ctx, fmt.Sprintf(`rm -f /tmp/stop /tmp/bad; echo 0 > /tmp/count
(i=0; while [ ! -e /tmp/stop ] && [ $i -lt %d ]; do
  i=$((i+1)); dd if=/dev/urandom of=/mnt/w$((i%%8)) bs=64k count=4 conv=fsync 2>/tmp/dd || { cat /tmp/dd > /tmp/bad; break; }
  echo $i > /tmp/count
done; echo done > /tmp/writer) >/dev/null 2>&1 &`, writerFor*100))
	return err
}

// writes waits until the guest's writer has done n more writes, all well.
func (d *demo) writes(ctx context.Context, n int) error {
	first := -1
	return d.until(ctx, fmt.Sprintf("%d more writes of the guest", n), func() (bool, error) {
		out, err := d.inGuest(ctx, "cat /tmp/count; cat /tmp/bad 2>/dev/null; dmesg | grep -i 'i/o error' | head -1; true")
		if err != nil {
			return false, err
		}
		count, rest, _ := strings.Cut(out, "\n")
		if strings.TrimSpace(rest) != "" {
			return false, fmt.Errorf("the guest saw an error: %s", rest)
		}
		i, err := strconv.Atoi(count)
		if err != nil {
			return false, nil // it was just being written
		}
		if first < 0 {
			first = i
		}
		return i >= first+n, nil
	})
}

func (d *demo) killPeer(ctx context.Context) (string, error) {
	if err := d.startWriter(ctx); err != nil {
		return "", err
	}
	if err := d.writes(ctx, 3); err != nil {
		return "", err
	}
	if err := d.c.Hold("host-2"); err != nil {
		return "", err
	}
	if err := d.c.Kill("host-2"); err != nil {
		return "", err
	}
	if err := d.until(ctx, "the exclusion of host-2", func() (bool, error) {
		m, err := d.member(ctx, "host-2")
		return err == nil && !m.InSync, nil
	}); err != nil {
		return "", err
	}
	if err := d.writes(ctx, 3); err != nil {
		return "", err
	}
	v, err := d.volume(ctx)
	return fmt.Sprintf("no error in the guest; longest write stall %.0f ms", float64(v.MaxWriteStallUs)/1000), err
}

func (d *demo) killOwn(ctx context.Context) (string, error) {
	old := d.pid("host-1")
	began := time.Now()
	if err := d.c.Kill("host-1"); err != nil {
		return "", err
	}
	if err := d.until(ctx, "host-1 serving again", func() (bool, error) {
		if pid := d.pid("host-1"); pid == 0 || pid == old {
			return false, nil
		}
		v, err := d.volume(ctx)
		return err == nil && v.URI != "" && strings.HasPrefix(v.State, "attached"), nil
	}); err != nil {
		return "", err
	}
	back := time.Since(began)
	if err := d.writes(ctx, 3); err != nil {
		return "", err
	}
	if _, err := d.inGuest(ctx, "touch /tmp/stop"); err != nil {
		return "", err
	}
	return fmt.Sprintf("no error in the guest; the volume served again after %.0f ms", float64(back.Milliseconds())),
		d.until(ctx, "the end of the guest's writer", func() (bool, error) {
			out, err := d.inGuest(ctx, "ls /tmp")
			return strings.Contains(out, "writer"), err
		})
}

func (d *demo) grow(ctx context.Context) (string, error) {
	if _, err := d.cairn(ctx, "volume", "resize", diskName, "--size", "12G"); err != nil {
		return "", err
	}
	if err := d.until(ctx, "the guest to see 12 GiB", func() (bool, error) {
		out, err := d.inGuest(ctx, "cat /sys/block/vda/size")
		return out == strconv.Itoa(12<<30/512), err
	}); err != nil {
		return "", err
	}
	if _, err := d.inGuest(ctx, "resize2fs /dev/vda"); err != nil {
		return "", err
	}
	return d.inGuest(ctx, "df -h /mnt | tail -1 | awk '{print \"file system: \" $2}'")
}

func (d *demo) move(ctx context.Context) (string, error) {
	if _, err := d.inGuest(ctx, "cd / && umount /mnt && umount /seed"); err != nil {
		return "", err
	}
	if _, err := d.stop(ctx); err != nil {
		return "", err
	}
	if _, err := d.startOn(ctx, "host-3"); err != nil {
		return "", err
	}
	out, err := d.inGuest(ctx, "mkdir -p /mnt && mount -t ext4 -o nodiscard /dev/vda /mnt && cd /mnt && sha256sum -c sums")
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d of %d files verified", strings.Count(out, ": OK"), strings.Count(out, "\n")+1), nil
}

func (d *demo) rejoin(ctx context.Context) (string, error) {
	if err := d.c.Release("host-2"); err != nil {
		return "", err
	}
	wait, cancel := context.WithTimeout(ctx, catchUpWait)
	defer cancel()
	err := d.until(wait, "host-2 in sync", func() (bool, error) {
		m, err := d.member(ctx, "host-2")
		return err == nil && m.InSync && m.State == "in-sync", nil
	})
	if err != nil {
		return "", err
	}
	m, err := d.member(ctx, "host-2")
	return fmt.Sprintf("in sync; %.1f MiB sent", float64(m.JoinedBytes)/(1<<20)), err
}

// trim shows that space comes back on every server.
func (d *demo) trim(ctx context.Context) (string, error) {
	if _, err := d.inGuest(ctx, "dd if=/dev/urandom of=/mnt/big bs=1M count=192 2>/dev/null && sync"); err != nil {
		return "", err
	}
	before, err := d.physical(ctx)
	if err != nil {
		return "", err
	}
	if _, err := d.inGuest(ctx, "rm /mnt/big /mnt/w* && sync && fstrim /mnt && sync"); err != nil {
		return "", err
	}
	var after map[string]int64
	err = d.until(ctx, "physical bytes to fall", func() (bool, error) {
		if after, err = d.physical(ctx); err != nil {
			return false, err
		}
		for host, n := range before {
			if after[host] > n-100<<20 {
				return false, nil
			}
		}
		return true, nil
	})
	var parts []string
	for _, host := range []string{"host-1", "host-2", "host-3"} {
		parts = append(parts, fmt.Sprintf("%s %d → %d MiB", host, before[host]>>20, after[host]>>20))
	}
	return strings.Join(parts, ", "), err
}

// server is what one host holds: what was promised, what can be read, and what
// it takes up.
type server struct {
	Host                    string
	Logical, Live, Physical int64 // bytes
}

// servers asks every host; the volumes' logical bytes count where they have a
// replica.
func (d *demo) servers(ctx context.Context) ([]server, error) {
	var volumes []struct {
		SizeBytes int64        `json:"sizeBytes"`
		Members   []memberView `json:"members"`
	}
	if err := d.ask(ctx, &volumes, "volume", "ls"); err != nil {
		return nil, err
	}
	var stores []struct {
		Host string `json:"host"`
		Live int64  `json:"liveBytes"`
	}
	if err := d.ask(ctx, &stores, "store", "ls"); err != nil {
		return nil, err
	}
	physical, err := d.physical(ctx)
	if err != nil {
		return nil, err
	}
	var out []server
	for _, st := range stores {
		sv := server{Host: st.Host, Live: st.Live, Physical: physical[st.Host]}
		for _, v := range volumes {
			for _, m := range v.Members {
				if m.Host == st.Host {
					sv.Logical += v.SizeBytes
				}
			}
		}
		out = append(out, sv)
	}
	return out, nil
}

// physical is what each host's store file takes up on its disk.
func (d *demo) physical(context.Context) (map[string]int64, error) {
	out := map[string]int64{}
	for _, host := range d.c.Names("host") {
		fi, err := os.Stat(d.storePath(host))
		if err != nil {
			return nil, err
		}
		out[host] = fi.Sys().(*syscall.Stat_t).Blocks * 512
	}
	return out, nil
}

func (d *demo) stop(ctx context.Context) (string, error) {
	if err := d.con.Close(); err != nil {
		return "", err
	}
	d.con = nil
	_, err := d.cairn(ctx, "vm", "stop", vmName)
	return "its volumes are flushed and let go", err
}

type memberView struct {
	Host        string `json:"host"`
	InSync      bool   `json:"inSync"`
	State       string `json:"state"`
	JoinedBytes uint64 `json:"joinedBytes"`
}

type volumeView struct {
	AllocatedBytes  uint64       `json:"allocatedBytes"`
	State           string       `json:"state"`
	URI             string       `json:"uri"`
	MaxWriteStallUs uint64       `json:"maxWriteStallUs"`
	Members         []memberView `json:"members"`
}

func (d *demo) volume(ctx context.Context) (v volumeView, err error) {
	return v, d.ask(ctx, &v, "volume", "show", diskName)
}

func (d *demo) member(ctx context.Context, host string) (memberView, error) {
	v, err := d.volume(ctx)
	for _, m := range v.Members {
		if m.Host == host {
			return m, err
		}
	}
	return memberView{}, fmt.Errorf("volume %s has no replica on %s (%w)", diskName, host, err)
}

// ask runs a command that shows something and reads its JSON.
func (d *demo) ask(ctx context.Context, into any, args ...string) error {
	out, err := d.cairn(ctx, append(args, "-o", "json")...)
	if err != nil {
		return err
	}
	return json.Unmarshal([]byte(out), into)
}

// until asks again and again until it is so.
func (d *demo) until(ctx context.Context, what string, ask func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, guestWait)
	defer cancel()
	t := time.NewTicker(pollEvery)
	defer t.Stop()
	for {
		ok, err := ask()
		if ok || err != nil {
			return err
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return fmt.Errorf("waited in vain for %s", what)
		}
	}
}
