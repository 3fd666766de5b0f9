SD2_UNET = dict(in_channels=4,out_channels=4,sample_size=96,block_out_channels=(320,640,1280,1280),layers_per_block=2,
 down_block_types=("CrossAttnDownBlock2D",)*3+("DownBlock2D",),up_block_types=("UpBlock2D",)+("CrossAttnUpBlock2D",)*3,
 attention_head_dim=(5,10,20,20),cross_attention_dim=1024,use_linear_projection=True)
